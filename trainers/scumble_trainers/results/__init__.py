"""Results of a run: the adapter, its card, samples, a published version."""
