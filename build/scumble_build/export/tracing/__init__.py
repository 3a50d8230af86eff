"""A module without weights → an ONNX graph."""
