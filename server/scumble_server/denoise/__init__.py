"""The loop: images join and leave between two steps, and each step is one batch."""
