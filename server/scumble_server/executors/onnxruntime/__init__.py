"""The exported graphs on ONNX Runtime."""
