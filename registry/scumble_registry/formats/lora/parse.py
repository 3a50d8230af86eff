"""Read a file's tensors into a record: keys by layout, grouped by module, and each module by its algorithm."""

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
    """A file's record, the dialect and algorithms that it was read from, and its unknown keys (`leftover`)."""

    record: LoraRecord
    dialect: str
    algorithms: dict[str, str]
    """Target → the algorithm's name."""
    leftover: tuple[str, ...]


@dataclass(slots=True)
class _Group:
    """The tensors of one target: part → its key in the file, part → values."""

    keys: dict[str, str] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    scaled: bool = True
    """Whether PEFT's config applies, because all its keys are PEFT's."""
    clamped: bool = False


def parse(tensors: Mapping[str, Array], scalings: Mapping[str, Scaling], base: BaseCompatibility | None) -> Parsed:
    """Read all tensors; `scalings` are by component. Raises Refused for an invalid or duplicate module."""
    names = Names(base)
    groups: dict[str, _Group] = {}
    dialects: Counter[str] = Counter()
    leftover = []
    for key in sorted(tensors):
        named = names.read(key)
        if named is None:
            leftover.append(key)
            continue
        dialects[named.dialect] += 1
        _put(groups, named, key, tensors[key])
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


def _put(groups: dict[str, _Group], named: NamedKey, key: str, values: Array) -> None:
    group = groups.setdefault(named.target, _Group())
    if named.part in group.keys:
        raise Refused(
            f"{named.target} is in the file twice, as {group.keys[named.part]} and as {key}; keep one of them",
            target=named.target,
        )
    group.keys[named.part], group.values[named.part] = key, values
    group.scaled &= named.dialect.startswith(_PEFT)
    group.clamped |= key.startswith("oft_unet_")
