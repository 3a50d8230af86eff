"""A pickle's content without its tensors: plain values, with a Leaf in place of each tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from scumble_registry.formats.pickled.machine import Global, Inert, Unsound, View
from scumble_registry.formats.safetensors_header import MAX_TENSORS

RAW = "tensor"
"""The name of a tensor that was pickled alone, outside a dict or list."""

_MAX_DEPTH, _MAX_NODES, _MAX_TEXT, _MAX_NAME = 60, 150_000, 16 << 20, 1024
_CONTAINERS = frozenset({"torch.nn.modules.container.ParameterDict", "torch.nn.modules.container.ParameterList"})


@dataclass(frozen=True, slots=True)
class Leaf:
    """The place of a tensor; `name` is its name in the safetensors file."""

    name: str


@dataclass(frozen=True, slots=True)
class Placeholder:
    """The place of an object that is not rebuilt; `name` is its class (`pathlib.PosixPath`, or `bytes`)."""

    name: str
    tensors: int = 0
    """Number of tensors that it held. They are not converted, so a reader that needs the object must refuse it."""


Plain: TypeAlias = (
    "dict[str | int, Plain] | list[Plain] | tuple[Plain, ...] | str | int | float | bool | Leaf | Placeholder | None"
)


class Flattening:
    """Encodes a machine's result as JSON for `decode` and collects the tensors by path, joined with '.'."""

    def __init__(self) -> None:
        self.tensors: dict[str, View] = {}
        self._nodes = 0
        self._text = 0

    def encode(self, value: Any, path: tuple[str, ...] = ()) -> Any:
        """Encode a value. Raises Unsound beyond limits of depth and size: a short pickle can name a list 2⁶⁰ times."""
        self._count(path)
        if value is None or isinstance(value, bool | float):
            return value
        for kind, encode in self._KINDS.items():
            if isinstance(value, kind):
                return encode(self, value, path)
        raise Unsound(f"a {type(value).__name__} at {'.'.join(path)!r}")

    def _int(self, value: int, path: tuple[str, ...]) -> int:
        if value.bit_length() > 64:
            raise Unsound(f"a whole number of {value.bit_length()} bits at {'.'.join(path)!r}")
        return value

    def _dict(self, value: dict[Any, Any], path: tuple[str, ...]) -> Any:
        return {"dict": [self._item(key, inner, path) for key, inner in value.items()]}

    def _list(self, value: list[Any] | tuple[Any, ...], path: tuple[str, ...]) -> Any:
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [self.encode(inner, (*path, str(i))) for i, inner in enumerate(value)]}

    def _inert(self, value: Inert, path: tuple[str, ...]) -> Any:
        if value.name in _CONTAINERS:
            return self.encode(_content(value), path)
        return {"other": self._word(value.name), "tensors": self._tensors_in(value.parts, len(path))}

    def _item(self, key: Any, value: Any, path: tuple[str, ...]) -> list[Any]:
        if isinstance(key, Global):  # Lightning: callbacks by their class
            key = key.name
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise Unsound(f"a key that is neither text nor a whole number at {'.'.join(path)!r}")
        return [self.encode(key), self.encode(value, (*path, str(key)))]

    def _name(self, view: View, path: tuple[str, ...]) -> str:
        name = ".".join(path) if path else RAW
        if len(name) > _MAX_NAME:
            raise Unsound(f"a tensor whose name has {len(name)} characters (at most {_MAX_NAME})")
        if name in self.tensors or name == "__metadata__":
            raise Unsound(f"two tensors of one name, {name!r}")
        self.tensors[name] = view
        if len(self.tensors) > MAX_TENSORS:
            raise Unsound(f"more than {MAX_TENSORS} tensors")
        return name

    def _word(self, text: str, _: Any = None) -> str:
        self._text += len(text)
        if self._text > _MAX_TEXT:
            raise Unsound(f"more than {_MAX_TEXT} characters of text beside the tensors")
        return text

    def _count(self, path: tuple[str, ...]) -> None:
        self._nodes += 1
        if self._nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
            raise Unsound(
                f"more than {_MAX_NODES} values, or lists in lists to a depth of over {_MAX_DEPTH} (or without end)"
            )

    def _tensors_in(self, value: Any, depth: int) -> int:
        self._count(("",) * depth)
        if isinstance(value, View):
            return 1
        inner: Any = ()
        if isinstance(value, Inert):
            inner = value.parts
        elif isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, list | tuple):
            inner = value
        return sum(self._tensors_in(item, depth + 1) for item in inner)

    _KINDS: ClassVar[dict[Any, Callable[[Any, Any, tuple[str, ...]], Any]]] = {
        int: _int,
        str: _word,
        dict: _dict,
        list: _list,
        tuple: _list,
        View: lambda self, view, path: {"leaf": self._name(view, path)},
        Inert: _inert,
        Global: lambda self, value, _: {"other": self._word(value.name), "tensors": 0},
    }


def decode(encoded: Any) -> Plain:
    """Check and decode the result of `encode` from the process that read an untrusted file. Raises ValueError."""
    if encoded is None or isinstance(encoded, str | int | float):
        return encoded
    match encoded:
        case {"leaf": str(name)}:
            return Leaf(name)
        case {"other": str(name), "tensors": int(count)}:
            return Placeholder(name, count)
        case {"list": list(values)}:
            return [decode(value) for value in values]
        case {"tuple": list(values)}:
            return tuple(decode(value) for value in values)
        case {"dict": list(pairs)}:
            decoded: dict[str | int, Plain] = {}
            for key, value in pairs:
                if not isinstance(key, str | int):
                    raise ValueError("a key that is neither text nor a whole number")
                decoded[key] = decode(value)
            return decoded
    raise ValueError("no encoded value")


def _content(container: Inert) -> Any:
    """Return {name: parameter} of a ParameterDict, or [parameter …] of a ParameterList. Raises Unsound."""
    state = next((part for part in reversed(container.parts) if isinstance(part, dict)), {})
    parameters = state.get("_parameters")
    if not isinstance(parameters, dict):
        raise Unsound(f"a {container.name} without _parameters")
    if container.name.endswith("List"):
        return list(parameters.values())
    keys = state.get("_keys")
    order = [key for key in keys if key in parameters] if isinstance(keys, dict) else parameters
    return {key: parameters[key] for key in order} | parameters
