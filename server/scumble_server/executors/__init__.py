"""Executors run the graphs: one protocol, implemented for PyTorch, ONNX Runtime and TensorRT."""
