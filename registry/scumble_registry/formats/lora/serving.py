"""The serving class of each module of a LoRA, and its description for `inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from pydantic import JsonValue

from scumble_registry.formats.floats import largest
from scumble_registry.formats.lora.record import (
    Dense,
    Gain,
    Kronecker,
    LoraModule,
    LoraRecord,
    Module,
    Product,
    row_columns,
)
from scumble_registry.formats.safetensors_header import Array


def serving(target: str, module: Module) -> str:
    """Return a module's serving class.

    `row`: factors, applied row by row; `row with gain`: with a scaling or mixing of the weight too; `variant`: merged
    into copies of the weights.
    """
    if row_columns(target, module) is None:
        return "variant"
    return "row with gain" if module.reads_weights or isinstance(module, Gain) else "row"


def is_change(module: Module) -> bool:
    """Return whether a module can change anything: False if its values are all zero, as before a training."""
    of_bias = module.of_bias if isinstance(module, Gain) else None
    if module.bias is not None or module.magnitude is not None or of_bias is not None:
        return True
    return all(bool(largest(values.reshape(-1), 0)) for values in _factors(module))


def _factors(module: Module) -> tuple[Array, ...]:
    """Return arrays of which none may be all zeros if the module is to change anything; none where zeros say little."""
    match module:
        case LoraModule(inner=None):
            return module.up, module.down
        case Product(first, second):
            return first.up, first.down, second.up, second.down
        case Kronecker(left, right):
            return left, right
        case Dense(delta):
            return () if delta is None else (delta,)
        case Gain():
            return (module.values,)
    return ()


def describe_modules(record: LoraRecord, algorithms: Mapping[str, str]) -> dict[str, JsonValue]:
    """Return target → algorithm, rank and alpha of factors, serving class."""
    return {target: _module(target, module, algorithms[target]) for target, module in record.items()}


def count_modules(record: LoraRecord, algorithms: Mapping[str, str]) -> dict[str, JsonValue]:
    """Count the modules of each component, algorithm and serving class, and those whose changes are all zero."""

    def count(words: Iterable[str]) -> JsonValue:
        return dict(sorted(Counter(words).items()))

    zero = sum(not is_change(module) for module in record.values())
    return {
        "components": count(target.partition(".")[0] for target in record),
        "algorithms": count(algorithms.values()),
        "serving": count(serving(target, module) for target, module in record.items()),
        **({"change nothing": zero} if zero else {}),
    }


def _module(target: str, module: Module, algorithm: str) -> JsonValue:
    description: dict[str, JsonValue] = {"algorithm": algorithm, "serving": serving(target, module)}
    if isinstance(module, LoraModule):
        description |= {"rank": module.rank, "alpha": module.alpha}
    if module.magnitude is not None:
        description["dora"] = ("rows", "columns")[module.magnitude.axis]
    return description
