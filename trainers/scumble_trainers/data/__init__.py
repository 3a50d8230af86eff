"""Training data: pictures, captions, sizes, latents."""
