"""The serving class of each module of a LoRA, and its description for `inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from pydantic import JsonValue

from scumble_registry.formats.lora.record import Gain, LoraModule, LoraRecord, Module, row_columns


def serving(target: str, module: Module) -> str:
    """Return a module's serving class.

    `row`: factors, applied row by row; `row with gain`: with a scaling or mixing of the weight too; `variant`: merged
    into copies of the weights.
    """
    if row_columns(target, module) is None:
        return "variant"
    return "row with gain" if module.reads_weights or isinstance(module, Gain) else "row"


def describe_modules(record: LoraRecord, algorithms: Mapping[str, str]) -> dict[str, JsonValue]:
    """Return target → algorithm, rank and alpha of factors, serving class."""
    return {target: _module(target, module, algorithms[target]) for target, module in record.items()}


def count_modules(record: LoraRecord, algorithms: Mapping[str, str]) -> dict[str, JsonValue]:
    """Count the modules of each component, algorithm and serving class."""

    def count(words: Iterable[str]) -> JsonValue:
        return dict(sorted(Counter(words).items()))

    return {
        "components": count(target.partition(".")[0] for target in record),
        "algorithms": count(algorithms.values()),
        "serving": count(serving(target, module) for target, module in record.items()),
    }


def _module(target: str, module: Module, algorithm: str) -> JsonValue:
    description: dict[str, JsonValue] = {"algorithm": algorithm, "serving": serving(target, module)}
    if isinstance(module, LoraModule):
        description |= {"rank": module.rank, "alpha": module.alpha}
    if module.magnitude is not None:
        description["dora"] = ("rows", "columns")[module.magnitude.axis]
    return description
