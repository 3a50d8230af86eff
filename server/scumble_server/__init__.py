"""The inference server: a denoise loop that batches steps of different requests, behind Triton."""
