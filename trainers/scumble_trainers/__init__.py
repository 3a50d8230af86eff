"""The offline trainers of the six adapter methods."""
