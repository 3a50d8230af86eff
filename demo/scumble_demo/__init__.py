"""Everything for the bundled base only: its training, its data, the evaluation of adapters, `scumble demo`."""
