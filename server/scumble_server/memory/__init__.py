"""Residency of adapters and checkpoints in memory under a byte budget."""
