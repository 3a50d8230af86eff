"""The denoiser compiled by torch.compile (TorchInductor), an option: minutes for each structure, then quicker steps.

Compiled code is for one structure of a step's record, so steps are padded to few (`executors/padding.py`). The loop
waits while a new structure is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from scumble.errors import Unavailable

StepT = TypeVar("StepT")
STRUCTURES = 256
"""Structures that are compiled, of all weights together; steps of further ones run eager. torch's own limit is 8."""


def compiled(compute: Callable[[StepT], Tensor]) -> Callable[[StepT], Tensor]:
    """Return the function compiled at its first call with each structure; sizes are constants in the code."""
    dynamo = torch._dynamo.config  # noqa: SLF001 - documented, but only there
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = STRUCTURES
    return torch.compile(compute, dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Compile a sum and run it, in some seconds. Raises Unavailable with the compiler's own words if that fails."""
    values = torch.arange(32.0, device=device)
    try:
        doubled = torch.compile(_doubled, dynamic=False)(values)
    except Exception as error:
        needs = "a C++ compiler and Python's headers" if device.type == "cpu" else "Triton and a C compiler"
        raise Unavailable(
            f"--compile needs {needs} (Debian: apt install g++ python3-dev), or leave it out; "
            f"torch says: {_reason(error)}"
        ) from error
    if not torch.equal(doubled, _doubled(values)):
        raise Unavailable("--compile: what this machine's compiler makes computes wrongly; leave it out")


def _doubled(values: Tensor) -> Tensor:
    return values + values


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
