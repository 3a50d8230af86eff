"""Trains the bundled base: a small Stable Diffusion (SD 1.5's classes) and the vision tower that scores it.

    data  →  vae  →  clip  →  unet  →  export  →  evaluate

Each stage writes checkpoints to the work folder and continues from them when it is started again.
"""
