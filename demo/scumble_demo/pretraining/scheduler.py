"""The noise schedule of SD 1.5."""

from __future__ import annotations

from diffusers import DDIMScheduler


def new_scheduler() -> DDIMScheduler:
    """Return the scheduler: 1,000 steps, square roots of betas linear from 0.00085 to 0.012; predicts the noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
