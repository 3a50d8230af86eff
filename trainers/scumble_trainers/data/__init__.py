"""What a trainer learns from: pictures, captions, sizes, latents."""
