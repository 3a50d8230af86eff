"""Runs the fused LoRA kernel in Triton's interpreter on the CPU and compares it with batched products in float32.

To be started with TRITON_INTERPRET=1. Prints a line of JSON for each case: the largest error, and the largest that the
rounding of the layer's own numbers explains.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import nn

from scumble_build.graphs.adapted import Factors, layout_of
from scumble_build.graphs.layout import Layout
from scumble_server.executors.torch.kernel import FusedKernel
from scumble_server.executors.torch.paged_lora import add_paged
from support.paging import some_factors

EPSILON = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1.5e-1}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main() -> None:
    cases = [(rank, 2, 4, 37, "fp32") for rank in (8, 16, 32, 64, 128, 256)]
    cases += [(16, rows_per_set, 6, tokens, "fp32") for rows_per_set in (0, 1, 6) for tokens in (1, 45)]
    cases += [(rank, 2, 4, 33, dtype) for rank in (8, 256) for dtype in ("fp16", "bf16")]
    for rank, rows_per_set, rows, tokens, dtype in cases:
        for small in (True, False):
            report(rank, rows_per_set, rows, tokens, dtype, small=small)


def report(rank: int, rows_per_set: int, rows: int, tokens: int, dtype: str, *, small: bool) -> None:
    torch.manual_seed(rank + tokens)
    base, other = nn.Linear(72, 104), nn.Linear(5, 7)
    name, kind = ("unet.attentions.it" if small else "unet.it"), DTYPES[dtype]
    layout = layout_of({"unet.attentions.other": other, name: base})
    sets = [row // (rows_per_set or 1) for row in range(rows)]
    factors = mixed(some_factors(layout, sets, rank, full=True, size=0.1, rows_per_set=rows_per_set))
    x = torch.randn(rows + 1, tokens, 72)
    layer = base.to(kind).requires_grad_(False)
    expected = run(layer.float(), factors, layout, name, x.to(kind).float(), kind, None)
    kernel = FusedKernel(add_paged)
    layer.to(kind)
    given = run(layer, factors.to(x.device, kind), layout, name, x.to(kind), kind, kernel)
    bare = layer(x.to(kind))
    print(
        json.dumps(
            {
                "case": [rank, rows_per_set, tokens, dtype, small],
                "fused": kernel.works,
                "error": float((given.float() - expected).abs().max()),
                "allowed": EPSILON[dtype],
                "added": float((given - bare)[:rows].abs().max()),
                "bare": float((given - bare)[rows:].abs().max()),
            }
        )
    )


def run(
    layer: nn.Linear,
    factors: Factors,
    layout: Layout,
    name: str,
    x: torch.Tensor,
    kind: torch.dtype,
    kernel: FusedKernel | None,
) -> torch.Tensor:
    rounded = factors.to(x.device, kind).to(x.device, x.dtype)
    return rounded.run(x, layer, layout.targets[name], kernel)


def mixed(factors: Factors) -> Factors:
    """Give the last row a lower rank than the others: columns of scale 0."""
    scale = factors.scale.clone()
    scale[-1, 8:] = 0
    return replace(factors, scale=scale)


if __name__ == "__main__":
    main()
