"""LoRA: pictures become low-rank factors."""
