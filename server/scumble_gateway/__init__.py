"""The front door: HTTP for product backends, between the network and Triton's gRPC. Without torch."""
