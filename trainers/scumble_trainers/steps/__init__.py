"""The training loop: random draws, losses, checkpoints, progress."""
