"""The exported graphs as TensorRT engines."""
