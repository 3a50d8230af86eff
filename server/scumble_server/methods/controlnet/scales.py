"""How strongly each residual acts: weight, and who goes first where prompt and control disagree.

| mode       | factor of residual i of n (0 is the shallowest)      | negative prompt's half |
|------------|-----------------------------------------------------|------------------------|
| balanced   | 1                                                   | the same               |
| prompt     | 0.825^(n-1-i)                                       | the same               |
| control    | 0.825^(n-1-i)                                       | none                   |
| guess      | 10^(i/(n-1) - 1), from 0.1 to 1                     | none                   |

`prompt` and `control` are "My prompt is more important" and "ControlNet is more important" of the webui's extension
(its numbers are ControlNet's own guess mode's, where n = 13); `guess` is diffusers'. A net that averages its residuals
over all places (shuffle) never acts on the negative half, and has no factors in guess mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SOFT = 0.825
_SOFT_FEATURES = (0.25, 0.62, 0.825, 1.0)
"""The webui's factors for T2I-Adapter's features."""


def of_residuals(mode: str, weight: float, count: int, rows: int, *, pools: bool) -> Tensor:
    """`(rows, count)`, rows 1 (prompt) or 2 (negative prompt, then prompt)."""
    prompt = weight * _factors(mode, count, pools=pools)
    negative = torch.zeros(count) if pools or mode in {"control", "guess"} else prompt
    return torch.stack([negative, prompt][2 - rows :])


def of_features(mode: str, weight: float, count: int, rows: int) -> Tensor:
    """The same for T2I-Adapter, `(rows, count)`; one row where the halves do not differ."""
    factors = torch.tensor([*(1.0,) * count, *_SOFT_FEATURES][-count:]) if mode != "balanced" else torch.ones(count)
    prompt = weight * factors
    if mode == "control" and rows == 2:
        return torch.stack([torch.zeros(count), prompt])
    return prompt[None]


def of_lite(mode: str, weight: float, rows: int) -> Tensor:
    """The same for an LLLite, `(rows,)`: in `control` mode the negative half is left alone."""
    negative = 0.0 if mode == "control" else weight
    return torch.tensor([negative, weight][2 - rows :])


def _factors(mode: str, count: int, *, pools: bool) -> Tensor:
    if mode in {"prompt", "control"}:
        return _SOFT ** torch.arange(count - 1, -1, -1.0)
    if mode == "guess" and not pools:
        return torch.logspace(-1, 0, count)
    return torch.ones(count)
