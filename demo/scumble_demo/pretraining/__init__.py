"""Trains the bundled base: a small Stable Diffusion (SD 1.5's classes) and the vision tower that scores it.

    data  →  vae  →  clip  →  unet  →  export  →  evaluate

Each stage writes checkpoints under the work folder and goes on from there when it is started again.
"""
