"""The reader's work without its process, and what it must equal: what torch reads."""

from __future__ import annotations

import mmap
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from scumble_registry.formats.pickled import Leaf, Placeholder
from scumble_registry.formats.pickled.child import read
from scumble_registry.formats.pickled.tensors import Input
from scumble_registry.formats.pickled.tree import decode

Tensors = dict[str, torch.Tensor]


def read_here(path: Path) -> tuple[Any, Tensors]:
    """What the reader's process does, in this one: the tree and the tensors. Raises Unsound."""
    out = BytesIO()
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        tree = decode(read(Input(file.fileno(), data), out))
    return tree, load(out.getvalue())


def check(ours: Any, theirs: Any, tensors: Tensors, path: str = "") -> None:
    """`ours` is `theirs` with a Leaf for each tensor, of which `tensors` has the values, bit for bit."""
    if isinstance(theirs, torch.Tensor):
        assert ours == Leaf(path or "tensor")
        found = tensors.pop(ours.name)
        assert (found.dtype, found.shape) == (theirs.dtype, theirs.shape)
        assert bits(found) == bits(theirs)
    elif isinstance(theirs, dict | torch.nn.ParameterDict):
        assert type(ours) is dict
        names = {key: name_of(key) if isinstance(key, type) else key for key in theirs}
        assert list(ours) == list(names.values())
        for key, name in names.items():
            check(ours[name], theirs[key], tensors, f"{path}.{name}" if path else str(name))
    elif isinstance(theirs, list | tuple):
        assert type(ours) is (list if isinstance(theirs, list) else tuple)
        assert len(ours) == len(theirs)
        for i, value in enumerate(theirs):
            check(ours[i], value, tensors, f"{path}.{i}" if path else str(i))
    elif isinstance(theirs, set):
        assert set(ours) == theirs
    elif theirs is None or isinstance(theirs, str | int | float):
        assert type(ours) is type(theirs)
        assert ours == theirs or theirs != theirs  # noqa: PLR0124 - NaN
    else:
        assert isinstance(ours, Placeholder)
        assert ours.name == name_of(type(theirs)) or isinstance(theirs, torch.dtype | type)


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
