"""The flat layout of factors: where each target's rows stand in one tensor over all targets.

A graph's LoRA inputs are two tensors, however many layers it has:

    A  (slots, Σ in,  R)      rows `in_offset  … + fan_in`  belong to one target
    B  (slots, Σ out, R)      rows `out_offset … + fan_out` belong to one target

so binding an adapter is two copies, and one graph serves every set of adapters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scumble.errors import Refused

RANK_BUCKETS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Target:
    """One layer of the base that takes factors, under its canonical name (`unet.…`, `text_encoder.…`)."""

    name: str
    fan_in: int
    fan_out: int
    in_offset: int
    out_offset: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All targets of one graph, in the order in which their rows stand."""

    targets: dict[str, Target]
    total_in: int
    total_out: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, int, int]]) -> Layout:
        """`shapes` yields (name, fan_in, fan_out)."""
        targets: dict[str, Target] = {}
        total_in = total_out = 0
        for name, fan_in, fan_out in shapes:
            targets[name] = Target(name, fan_in, fan_out, total_in, total_out)
            total_in += fan_in
            total_out += fan_out
        return cls(targets, total_in, total_out)


def rank_bucket(rank: int) -> int:
    """The smallest bucket that holds `rank` columns. Raises Refused beyond the largest."""
    for bucket in RANK_BUCKETS:
        if rank <= bucket:
            return bucket
    raise Refused(
        f"the request's LoRAs have {rank} rank columns together, the largest bucket is {RANK_BUCKETS[-1]}; "
        "use fewer LoRAs or resize them to a lower rank",
        rank=rank,
        largest=RANK_BUCKETS[-1],
    )
