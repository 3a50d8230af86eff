"""The flat layout of factors: which layers are targets, and where each one's factors are in a page.

Factors are stored in *rank pages*. A page holds PAGE rank columns of an ordered set of LoRAs, for every target. It is
flat,

    A  (pages, PAGE · Σ in)       at PAGE · in_offset  a block (PAGE, fan_in)
    B  (pages, PAGE · Σ out)      at PAGE · out_offset a block (PAGE, fan_out)

so a graph has a few LoRA inputs however many layers it has, binding an adapter copies whole pages, and a set takes as
many pages as its own rank needs. A k×k convolution has k·k·in numbers in a column of A, tap by tap. Targets begin at
multiples of ALIGN, so that a graph can gather units of PAGE · ALIGN numbers.

The *small* layout (layers inside attention blocks, the only ones in most LoRAs) comes before the *rest* (every other
layer with weights), which has its own pages: a set without targets there has none of them. Both together are the *full*
layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from scumble.errors import Refused

RANK_BUCKETS = (8, 16, 32, 64, 128, 256)
PAGE = 8
"""Rank columns of a page."""
ALIGN = 32


@dataclass(frozen=True, slots=True)
class TargetShape:
    """A layer that can take factors: its canonical name (`unet.…`, `text_encoder.…`), and the length of a column of A
    (fan_in) and of B (fan_out).
    """

    name: str
    fan_in: int
    fan_out: int
    small: bool = True


@dataclass(frozen=True, slots=True)
class Target:
    """A layer of the layout, with its offsets in the full one."""

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
    """The length of a column of A and of B, over all targets."""

    total_in: int
    total_out: int

    def __sub__(self, other: Extent) -> Extent:
        return Extent(self.total_in - other.total_in, self.total_out - other.total_out)


@dataclass(frozen=True, slots=True)
class Layout:
    """All targets of one graph, in order."""

    targets: dict[str, Target]
    small: Extent
    full: Extent
    digest: str
    """Digest of targets and offsets: pages of one layout fit every layout with the same digest."""

    @property
    def rest(self) -> Extent:
        """The extent of the layers after the small layout."""
        return self.full - self.small

    @classmethod
    def of(cls, shapes: Iterable[TargetShape]) -> Layout:
        targets: dict[str, Target] = {}
        small = full = Extent(0, 0)
        for shape in sorted(shapes, key=lambda shape: not shape.small):
            targets[shape.name] = Target(shape.name, shape.fan_in, shape.fan_out, full.total_in, full.total_out)
            full = Extent(_aligned(full.total_in + shape.fan_in), _aligned(full.total_out + shape.fan_out))
            if shape.small:
                small = full
        return cls(targets, small, full, sha256(repr(targets).encode()).hexdigest())

    def extent(self, names: Iterable[str]) -> Extent:
        """Return the extent of the small layout if it holds all of `names` that are targets here, else
        of the full one.
        """
        targets = [self.targets[name] for name in names if name in self.targets]
        return self.small if all(target.in_end <= self.small.total_in for target in targets) else self.full


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def pages_for(rank: int) -> int:
    """Return the number of pages for `rank` columns."""
    return -(-rank // PAGE)


def rank_bucket(rank: int) -> int:
    """Return the smallest bucket that holds `rank` columns. Raises Refused beyond the largest."""
    for bucket in RANK_BUCKETS:
        if rank <= bucket:
            return bucket
    raise Refused(
        f"the request's LoRAs have {rank} rank columns together, the largest bucket is {RANK_BUCKETS[-1]}; "
        "use fewer LoRAs or resize them to a lower rank",
        rank=rank,
        largest=RANK_BUCKETS[-1],
    )
