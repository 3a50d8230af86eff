"""A file's tensors → the record: keys are read by their spelling, gathered by module, each module by its algorithm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from scumble.errors import Refused
from scumble_registry.compatibility import BaseCompatibility, norm_shapes
from scumble_registry.formats.lora.algorithms import ModuleTensors, build
from scumble_registry.formats.lora.names import NamedKey, Names
from scumble_registry.formats.lora.peft import Scaling
from scumble_registry.formats.lora.record import LoraRecord
from scumble_registry.formats.safetensors_header import Array

_PEFT = ("diffusers", "PEFT")
_NO_SCALING = Scaling()


@dataclass(slots=True)
class Parsed:
    """`leftover` are keys that nobody understands; `rank` and `alpha` as the file has them, not as they are served."""

    record: LoraRecord
    dialect: str
    algorithms: dict[str, str]
    """Target → the algorithm's name."""
    leftover: tuple[str, ...]


@dataclass(slots=True)
class _Group:
    """All of one target: part → the key that it came from, and its values."""

    keys: dict[str, str] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    scaled: bool = True
    """Its numbers are PEFT's, so PEFT's config counts."""
    clamped: bool = False


def parse(tensors: Mapping[str, Array], scalings: Mapping[str, Scaling], base: BaseCompatibility | None) -> Parsed:
    """`scalings` by component. Raises Refused for a module that is not sound, or that stands there twice."""
    names = Names(base)
    groups: dict[str, _Group] = {}
    dialects: Counter[str] = Counter()
    leftover = []
    for key in sorted(tensors):
        place = names.read(key)
        if place is None:
            leftover.append(key)
            continue
        dialects[place.dialect] += 1
        _put(groups, place, key, tensors[key])
    shapes = {**norm_shapes(base), **base.targets} if base is not None else {}
    record: LoraRecord = {}
    algorithms: dict[str, str] = {}
    for target in sorted(groups):
        group = groups[target]
        scaling = scalings.get(target.partition(".")[0], _NO_SCALING) if group.scaled else _NO_SCALING
        parts = ModuleTensors(target, group.values, shapes.get(target), scaling, group.clamped)
        built = build(parts)
        if built is not None:
            record[target], algorithms[target] = built
        leftover += [key for part, key in group.keys.items() if built is None or part not in parts.taken]
    dialect = " and ".join(name for name, _ in dialects.most_common())
    return Parsed(record, dialect, algorithms, tuple(sorted(leftover)))


def _put(groups: dict[str, _Group], place: NamedKey, key: str, values: Array) -> None:
    group = groups.setdefault(place.target, _Group())
    if place.part in group.keys:
        raise Refused(
            f"{place.target} stands in the file twice, as {group.keys[place.part]} and as {key}; keep one of them",
            target=place.target,
        )
    group.keys[place.part], group.values[place.part] = key, values
    group.scaled &= place.dialect.startswith(_PEFT)
    group.clamped |= key.startswith("oft_unet_")
