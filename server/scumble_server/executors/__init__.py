"""What runs the graphs: one protocol, and an executor each for PyTorch, ONNX Runtime and TensorRT."""
