"""What exists for the bundled base alone: its pretraining, its pictures, the judge of adapters, the demo."""
