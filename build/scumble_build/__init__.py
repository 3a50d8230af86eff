"""The graphs that Scumble runs, with adapters as inputs, and (later) their export to ONNX and TensorRT."""
