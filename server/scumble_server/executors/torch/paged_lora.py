"""The fused kernel of linear layers' factors, in the Triton language (not Triton, the server). For every set of pages:

    y[t] += Bᵀ (scale[t] ⊙ (A x[t]))        for the tokens t of the rows that share the set

SGMV's prefill form (Chen et al., Punica, 2310.18547): a program takes BM tokens of a set and a stretch of output
channels. It sums A x over the input, keeps the BM × R result in registers, and adds the product with B. So x is read
once for each stretch and y once; pages are read where they are, and nothing is gathered or written besides y.

Only this module imports `triton`, which need not be there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scumble_build.graphs.adapted import PagesOfLayer
from scumble_build.graphs.layout import PAGE

PROGRAMS = 512
"""Programs that fill a large GPU a few times over: outputs are split until there are as many."""
_PAGE = tl.constexpr(PAGE)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tokens, input and output channels of a tile; warps of a program; stages of a pipelined loop."""

    tokens: int
    inputs: int
    outputs: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rank: int, dtype: torch.dtype) -> Tiles:
        """Choose tiles whose sums fit into registers, and whose loads fit into 99 KiB of shared memory (SM 89, 120)."""
        if dtype == torch.float32:  # no tensor cores, twice the memory
            return cls(32, 32, 32, 4, 2) if rank <= 64 else cls(16, 16, 16, 8, 2)
        if rank <= 64:
            return cls(64, 64, 64, 4, 3)
        return cls(64, 32, 64, 8, 3) if rank <= 128 else cls(32, 32, 32, 8, 2)


@triton.jit
def paged_lora(
    x,
    y,
    A,
    B,
    table,
    scale,
    tokens,
    per_row,
    inputs,
    outputs,
    stretch,
    A_page,
    B_page,
    table_set,
    table_page,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x (b, tokens, inputs), y (b, tokens, outputs) and scale (rows, R) are contiguous; a row has `per_row` tokens.

    RANKS is R rounded up to what a product takes. A program computes `stretch` output channels, a multiple of BN.
    WIDE: products take float32, for the interpreter, which would multiply the bits of bfloat16.
    """
    of_set = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BM
    local = tl.arange(0, BM)
    there = first + local < tokens
    rank = tl.arange(0, RANKS)
    active = rank < R
    page = tl.load(table + of_set * table_set + (rank // _PAGE) * table_page, mask=active, other=0)
    start = of_set * tokens + first
    x += start * inputs
    column = A + page * A_page + (rank % _PAGE) * inputs
    channel = tl.arange(0, BK)
    hidden = tl.zeros((BM, RANKS), tl.float32)
    for k in range(0, inputs, BK):
        inside = k + channel < inputs
        states = tl.load(
            x + local[:, None] * inputs + (k + channel)[None, :], there[:, None] & inside[None, :], other=0.0
        )
        down = tl.load(column[None, :] + (k + channel)[:, None], inside[:, None] & active[None, :], other=0.0)
        if WIDE:
            states, down = states.to(tl.float32), down.to(tl.float32)
        hidden = tl.dot(states, down, hidden, input_precision="ieee")
    row = of_set * (tokens // per_row) + (first + local) // per_row
    weight = tl.load(scale + row[:, None] * R + rank[None, :], there[:, None] & active[None, :], other=0.0)
    scaled = (hidden * weight).to(y.dtype.element_ty)
    y += start * outputs
    column = B + page * B_page + (rank % _PAGE) * outputs
    channel = tl.arange(0, BN)
    begin = tl.program_id(2) * stretch
    for n in range(begin, min(begin + stretch, outputs), BN):
        inside = n + channel < outputs
        up = tl.load(column[:, None] + (n + channel)[None, :], active[:, None] & inside[None, :], other=0.0)
        into = y + local[:, None] * outputs + (n + channel)[None, :]
        mask = there[:, None] & inside[None, :]
        total = tl.load(into, mask, other=0.0).to(tl.float32)
        if WIDE:
            total += tl.dot(scaled.to(tl.float32), up.to(tl.float32), input_precision="ieee")
        else:
            total = tl.dot(scaled, up, total, input_precision="ieee")
        tl.store(into, total.to(y.dtype.element_ty), mask)


def constants(rank: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Return the kernel's constants and the compiler's options."""
    tiles = Tiles.of(rank, dtype)
    ranks = max(16, 1 << (rank - 1).bit_length())
    sizes = {"R": rank, "RANKS": ranks, "BM": tiles.tokens, "BK": tiles.inputs, "BN": tiles.outputs}
    sizes["WIDE"] = bool(triton.knobs.runtime.interpret)
    return sizes, {"num_warps": tiles.warps, "num_stages": tiles.stages}


def add_paged(x: Tensor, y: Tensor, read: PagesOfLayer) -> None:
    """Add the factors' part to the first m rows of y `(rows, N, out)`, in place; x `(rows, N, in)`.

    Raises ValueError for a y with gaps, of which a copy would be changed.
    """
    if not y.is_contiguous():
        raise ValueError("the fused kernel adds to contiguous memory only")
    rows, rank = read.scale.shape
    batch, per_row = len(read.table), x.shape[1]
    tokens, (inputs, outputs) = rows // batch * per_row, (x.shape[2], y.shape[2])
    sizes, options = constants(rank, x.dtype)
    blocks = triton.cdiv(tokens, sizes["BM"])
    parts = max(1, min(triton.cdiv(outputs, sizes["BN"]), PROGRAMS // (blocks * batch)))
    stretch = triton.cdiv(triton.cdiv(outputs, parts), sizes["BN"]) * sizes["BN"]
    kernel: Any = paged_lora
    kernel[blocks, batch, triton.cdiv(outputs, stretch)](
        x[:rows].contiguous(),
        y,
        read.A,
        read.B,
        read.table,
        read.scale.contiguous(),
        tokens,
        per_row,
        inputs,
        outputs,
        stretch,
        read.A.stride(0),
        read.B.stride(0),
        *read.table.stride(),
        **sizes,
        **options,
    )
