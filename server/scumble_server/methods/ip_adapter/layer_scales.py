"""An IP-Adapter's `scale`: how much it counts in each layer, in the notation of diffusers' `set_ip_adapter_scale`.

    0.6                                          every layer
    {"up": {"block_0": [0.0, 1.0, 0.0]}}         by side, block and transformer; what is not named has 0
    {"down": 1, "mid": 0.5, "up": {"block_1": 2}}
    [0.6, 0.2]                                   one for each picture, if each has a mask; also in place of any number

Beyond diffusers, a name that this base does not have is refused where diffusers overlooks some.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from scumble.errors import InvalidRequest

FIELD = "adapters.scale"
_PLACE = re.compile(r"unet\.(?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)\.")

Leaf = float | tuple[float, ...]
Scale = float | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Tree:
    """The transformers of a UNet: side → block → how many; `mid` has one block, called `mid`."""

    sides: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, attentions: Iterable[str]) -> _Tree:
        tree = cls()
        for name in attentions:
            side, block, index = _place(name)
            blocks = tree.sides.setdefault(side, {})
            blocks[block] = max(blocks.get(block, 0), index + 1)
        return tree


def layer_scales(scale: Scale, attentions: Sequence[str], pictures: int, *, masked: bool) -> list[dict[str, float]]:
    """For each of `pictures` pictures: canonical name of a cross-attention → its scale.

    Raises InvalidRequest for an unknown block, a list of another length, or a list of pictures without masks.
    """
    if isinstance(scale, Mapping):
        leaves = _from_tree(scale, _Tree.of(attentions))
        of = {name: leaves[_place(name)] for name in attentions}
    else:
        of = dict.fromkeys(attentions, _leaf(scale, "scale"))
    for leaf in of.values():
        if isinstance(leaf, tuple) and (not masked or len(leaf) != pictures):
            raise _wrong(
                f"{len(leaf)} scales for {pictures} pictures; a scale for each picture needs a mask for each"
                if not masked
                else f"{len(leaf)} scales for {pictures} masked pictures; give one for each"
            )
    return [
        {name: leaf[index] if isinstance(leaf, tuple) else leaf for name, leaf in of.items()}
        for index in range(pictures)
    ]


def _from_tree(given: Mapping[str, Any], tree: _Tree) -> dict[tuple[str, str, int], Leaf]:
    """(side, block, transformer) → leaf, for every transformer of the base."""
    _check_names(given, tree.sides, "")
    leaves: dict[tuple[str, str, int], Leaf] = {}
    for side, blocks in tree.sides.items():
        of_side = given.get(side, 0.0)
        if isinstance(of_side, Mapping):
            _check_names(of_side, blocks, f"{side}.")
        for block, count in blocks.items():
            value = of_side.get(block, 0.0) if isinstance(of_side, Mapping) else of_side
            where = block if side == "mid" else f"{side}.{block}"
            for index, leaf in enumerate(_spread(value, count, where)):
                leaves[side, block, index] = leaf
    return leaves


def _spread(value: Any, count: int, where: str) -> list[Leaf]:
    """One value for all of a block's transformers, or a list with one for each."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [_leaf(value, where)] * count
    if len(value) not in {1, count}:
        raise _wrong(f"{where} has {count} transformers, but {len(value)} scales were given")
    return [_leaf(each, where) for each in value] * (count if len(value) == 1 else 1)


def _leaf(value: Any, where: str) -> Leaf:
    if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
        return float(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = [_leaf(each, where) for each in value]
        if len(numbers) == 1:
            return numbers[0]
        if numbers and all(isinstance(each, float) for each in numbers):
            return tuple(each for each in numbers if isinstance(each, float))
    raise _wrong(f"{where} is {value!r}; a number is needed, or a list with one for each masked picture")


def _check_names(given: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> None:
    for name in given:
        if name not in known:
            raise _wrong(f"this base has no {prefix}{name} with cross-attention; it has {prefix}{{{', '.join(known)}}}")


def _place(name: str) -> tuple[str, str, int]:
    match = _PLACE.match(name)
    assert match is not None
    return match[1] or "mid", f"block_{match[2]}" if match[1] else "mid", int(match[4])


def _wrong(problem: str) -> InvalidRequest:
    return InvalidRequest(problem, field=FIELD)
