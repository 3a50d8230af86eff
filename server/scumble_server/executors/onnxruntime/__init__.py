"""The executor on ONNX Runtime."""
