"""The executor on TensorRT engines."""
