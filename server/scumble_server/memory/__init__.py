"""What stays in memory, under a budget of bytes, and what makes room for it."""
