"""What a model's output says about a sample x = α·x̂₀ + σ·ε̂ at a timestep of amplitudes (α, σ), α² + σ² = 1."""

from __future__ import annotations

from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def original(prediction: str, alpha: Tensor, sigma: Tensor, x: Tensor, m: Tensor) -> Tensor:
    """Return x̂₀. v is αε − σx₀ (Salimans & Ho, 2202.00512, appendix D)."""
    if prediction == "epsilon":
        return (x - sigma * m) / alpha
    return m if prediction == "sample" else alpha * x - sigma * m


def noise(prediction: str, alpha: Tensor, sigma: Tensor, x: Tensor, m: Tensor) -> Tensor:
    """Return ε̂."""
    if prediction == "epsilon":
        return m
    return (x - alpha * m) / sigma if prediction == "sample" else alpha * m + sigma * x
