"""The networks as graphs that take adapters as inputs."""
