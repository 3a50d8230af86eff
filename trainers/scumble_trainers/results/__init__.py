"""What a run leaves: the adapter, its card, its samples, a published version."""
