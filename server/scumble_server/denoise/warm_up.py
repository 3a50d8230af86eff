"""Takes common steps before the first request, so that their CUDA graphs are there when it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from scumble_build.graphs.adapted import Factors, Pages
from scumble_build.graphs.inputs import StepInputs
from scumble_build.graphs.layout import PAGE
from scumble_build.graphs.text import TextInputs
from scumble_server.base import Base
from scumble_server.executors.padding import TEXT
from scumble_server.executors.protocol import Executor
from scumble_server.memory.pages import Pools

IMAGES = (8, 4, 2, 1)
"""The most first: later steps run in the same buffers, so that they stay where they are."""
RANK = 16
"""Of the LoRAs; smaller ones run in the same graph."""


@torch.inference_mode()
def warm_up(
    base: Base,
    executor: Executor,
    pools: Pools,
    max_images: int,
    *,
    before_each: Callable[[], object] = lambda: None,
) -> int:
    """Take steps of guided images at the base's native size: without LoRAs, with one for all, with one for each.

    Each step is taken twice, as what comes a second time is captured. Returns the number of different steps. To be
    called by the loop's thread, which says that it runs by `before_each`. Raises what a step raises.
    """
    before_each()
    steps = [
        inputs for images in IMAGES if images <= max_images for inputs in _steps(base, executor, pools, 2 * images)
    ]
    steps = [inputs for inputs in steps if len(inputs.kv) <= executor.max_rows]
    scale = base.compatibility.vae_scale
    height, width = base.defaults.height // scale, base.defaults.width // scale
    for inputs in steps:
        rows = len(inputs.kv)
        sample = torch.zeros(rows, base.compatibility.in_channels, height, width, device=executor.device)
        for _ in range(2):
            before_each()
            executor.denoise(sample, torch.zeros(rows, device=executor.device), inputs)
    return len(steps)


def _steps(base: Base, executor: Executor, pools: Pools, rows: int) -> Iterator[StepInputs]:
    device, dtype = torch.device(executor.device), executor.dtype
    kv = torch.zeros(rows, TEXT, sum(2 * part.width for part in executor.kv_slices), device=device, dtype=dtype)
    plain = StepInputs(kv)
    if base.family.sizes:
        empty = TextInputs(torch.zeros(1, TEXT, dtype=torch.int64))
        pooled = executor.encode(len(base.family.texts) - 1, empty).pooled
        assert pooled is not None
        plain = replace(plain, pooled=pooled.repeat(rows, 1), sizes=torch.zeros(rows, 6, device=device))
    yield plain
    pool = pools.of(executor.step_layout.small, device, dtype, executor.most_pages[0])
    pages = Pages(*pool.tensors, torch.zeros(rows, RANK // PAGE, dtype=torch.int64, device=device))
    scale = torch.zeros(rows, RANK, device=device)
    yield replace(plain, factors=Factors(pages, None, scale, rows_per_set=rows))
    if rows > 2:
        yield replace(plain, factors=Factors(pages, None, scale, rows_per_set=2))
