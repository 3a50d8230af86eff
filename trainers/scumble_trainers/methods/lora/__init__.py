"""LoRA (Hu et al., 2106.09685): low-rank factors beside frozen weights."""
