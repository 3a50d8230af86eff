"""The flat layout of factors: where each target's stand in a page, and which layers are targets.

Factors are kept in *rank pages*: of an ordered set of LoRAs, a page has PAGE columns for every target. A page is flat,

    A  (pages, PAGE · Σ in)       at PAGE · in_offset  a block (PAGE, fan_in)
    B  (pages, PAGE · Σ out)      at PAGE · out_offset a block (PAGE, fan_out)

so a graph's LoRA inputs are a few tensors, however many layers it has, binding an adapter is copies of whole pages, and
a set takes as many pages as its rank needs, whatever the rank of its neighbours. A k×k convolution has k·k·in numbers
in a column of A, tap by tap. Targets begin at multiples of ALIGN, so that a graph can gather units of PAGE · ALIGN
numbers.

The *small* layout (layers inside attention blocks, which most LoRAs keep to) comes before the *rest* (every other layer
with weights), which has pages of its own: a set that touches none of the rest has none of them. Both together are the
*full* one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from scumble.errors import Refused

RANK_BUCKETS = (8, 16, 32, 64, 128, 256)
PAGE = 8
"""Columns of a page."""
ALIGN = 32


@dataclass(frozen=True, slots=True)
class TargetShape:
    """A layer that can take factors: its canonical name (`unet.…`, `text_encoder.…`), and how many numbers a column of
    A and of B has for it.
    """

    name: str
    fan_in: int
    fan_out: int
    small: bool = True


@dataclass(frozen=True, slots=True)
class Target:
    """A layer of the layout and where it stands, counted over the full one."""

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
    """How many numbers a column of A and of B has, over all targets."""

    total_in: int
    total_out: int

    def __sub__(self, other: Extent) -> Extent:
        return Extent(self.total_in - other.total_in, self.total_out - other.total_out)


@dataclass(frozen=True, slots=True)
class Layout:
    """All targets of one graph, in their order."""

    targets: dict[str, Target]
    small: Extent
    full: Extent
    digest: str
    """Of the targets and where they stand: what is laid out for one layout fits every other with the same digest."""

    @property
    def rest(self) -> Extent:
        """Of what stands behind the small layout."""
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
        """The smaller of the two layouts that holds all of `names` that are targets here."""
        targets = [self.targets[name] for name in names if name in self.targets]
        return self.small if all(target.in_end <= self.small.total_in for target in targets) else self.full


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def pages_for(rank: int) -> int:
    """How many hold so many columns."""
    return -(-rank // PAGE)


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
