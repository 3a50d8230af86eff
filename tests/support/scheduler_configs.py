"""Configs of schedulers, with everything that the classes of diffusers which are served can be asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

_SIGMAS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_lu_lambdas": True}]
_FLOW: list[dict[str, Any]] = [
    {"use_flow_sigmas": True, "flow_shift": 1.0},
    {"use_flow_sigmas": True, "flow_shift": 3.0},
    {"use_flow_sigmas": True, "flow_shift": 2.0, "shift_terminal": 0.1},
    {"use_flow_sigmas": True, "use_karras_sigmas": True},
]
_BETAS: list[dict[str, Any]] = [
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(0.001, 0.02, 200).tolist(), "num_train_timesteps": 200},
]
_OPTIONS: dict[str, list[Any]] = {
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
    "set_alpha_to_one": [False, True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "lower_order_final": [False, True],
    "euler_at_final": [False, True],
    "solver_order": [1, 2, 3, 4],
    "solver_type": ["midpoint", "heun", "bh1", "bh2", "logrho"],
    "lambda_min_clipped": [-float("inf"), -5.1],
    "variance_type": [None, "learned"],
    "interpolation_type": ["linear", "log_linear"],
    "timestep_type": ["discrete", "continuous"],
    "sigma_min": [None, 0.1],
    "sigma_max": [None, 12.0],
    "original_inference_steps": [20, 50, 200],
    "timestep_scaling": [10.0, 1.0],
    "predict_x0": [True, False],
    "disable_corrector": [[], [0], [1, 3]],
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A few options beside what a class has by default; without its name, so that no class leaves any of them out."""
    asked = draw(st.fixed_dictionaries({}, optional={key: st.sampled_from(some) for key, some in _OPTIONS.items()}))
    return {"clip_sample": False, **draw(st.sampled_from(_BETAS)), **draw(st.sampled_from(_SIGMAS + _FLOW)), **asked}
