"""The graphs in eager PyTorch."""
