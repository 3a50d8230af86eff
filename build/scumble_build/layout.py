"""The flat layout of factors: where each target's rows stand in one tensor over all targets.

A graph's LoRA inputs are two tensors, however many layers it has:

    A  (slots, Σ in,  R)      rows `in_offset  … + fan_in`  belong to one target
    B  (slots, Σ out, R)      rows `out_offset … + fan_out` belong to one target

so binding an adapter is two copies, and one graph serves every set of adapters. A k×k convolution has k·k·in
rows in A, tap by tap.

The *small* layout (layers inside attention blocks, which most LoRAs keep to) is a prefix of the *full* one (every
layer with weights): tensors with fewer rows mean that no row of the batch needs the layers behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scumble.errors import Refused

RANK_BUCKETS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer that can take factors: its canonical name (`unet.…`, `text_encoder.…`) and its rows in A and B."""

    name: str
    fan_in: int
    fan_out: int
    small: bool = True


@dataclass(frozen=True, slots=True)
class Target:
    """A layer of the layout and where its rows stand."""

    name: str
    fan_in: int
    fan_out: int
    in_offset: int
    out_offset: int

    @property
    def in_end(self) -> int:
        return self.in_offset + self.fan_in

    @property
    def out_end(self) -> int:
        return self.out_offset + self.fan_out


@dataclass(frozen=True, slots=True)
class Extent:
    """How many rows A and B have."""

    total_in: int
    total_out: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All targets of one graph, in the order in which their rows stand."""

    targets: dict[str, Target]
    small: Extent
    full: Extent

    @classmethod
    def of(cls, shapes: Iterable[Shape]) -> Layout:
        targets: dict[str, Target] = {}
        small = full = Extent(0, 0)
        for shape in sorted(shapes, key=lambda shape: not shape.small):
            targets[shape.name] = Target(shape.name, shape.fan_in, shape.fan_out, full.total_in, full.total_out)
            full = Extent(full.total_in + shape.fan_in, full.total_out + shape.fan_out)
            if shape.small:
                small = full
        return cls(targets, small, full)

    def extent(self, names: Iterable[str]) -> Extent:
        """The smaller of the two layouts that holds all of `names` that are targets here."""
        targets = [self.targets[name] for name in names if name in self.targets]
        return self.small if all(target.in_end <= self.small.total_in for target in targets) else self.full


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
