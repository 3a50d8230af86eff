"""The tensors inside a record: a dataclass of tensors, of tuples and mappings of tensors, and of further records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

RecordT = TypeVar("RecordT")


def parts_of(record: object) -> Iterator[tuple[str, Any]]:
    """Yield a dataclass's fields, a tuple's items or a mapping's values, each with its name, index or key."""
    if isinstance(record, tuple):
        yield from ((str(index), value) for index, value in enumerate(record))
    elif isinstance(record, Mapping):
        yield from ((str(key), value) for key, value in record.items())
    else:
        yield from ((field.name, getattr(record, field.name)) for field in fields(record))  # type: ignore[arg-type]


def has_parts(value: object) -> bool:
    return is_dataclass(value) or isinstance(value, tuple | Mapping)


def tensors_of(record: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a record, each with its path."""
    for name, value in parts_of(record):
        path = f"{prefix}{name}"
        if isinstance(value, Tensor):
            yield path, value
        elif has_parts(value):
            yield from tensors_of(value, f"{path}.")


def with_tensors(record: RecordT, tensors: Mapping[str, Tensor]) -> RecordT:
    """Return the same record with other tensors at the same paths."""
    return _changed(record, lambda path, _tensor: tensors[path], "")


def moved(record: RecordT, device: torch.device, dtype: torch.dtype) -> RecordT:
    """Return the same record on `device`, with every floating point tensor in `dtype`.

    Tensors that are already there are not copied.
    """

    def move(_path: str, tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    return _changed(record, move, "")


def _changed(record: RecordT, change: Callable[[str, Tensor], Tensor], prefix: str) -> RecordT:
    def part(name: str, value: Any) -> Any:
        path = f"{prefix}{name}"
        if isinstance(value, Tensor):
            return change(path, value)
        return _changed(value, change, f"{path}.") if has_parts(value) else value

    changed = {name: part(name, value) for name, value in parts_of(record)}
    if isinstance(record, tuple):
        return type(record)(changed.values())
    if isinstance(record, Mapping):
        return changed  # type: ignore[return-value]
    return replace(record, **changed)  # type: ignore[type-var]
