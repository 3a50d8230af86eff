"""Trains: draws, losses, the loop and its checkpoints."""
