"""The executor in eager PyTorch."""
