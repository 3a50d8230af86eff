"""Pickle's stack machine, restricted to building data: it imports nothing and calls nothing.

`pickletools.genops` splits the bytes into opcodes and their arguments; each known opcode has one method.
(https://docs.python.org/3/library/pickletools.html; protocols 0 to 5.) A function that an opcode would call is looked
up in `meaning.py`, which returns data or refuses.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, ClassVar

MAX_OPCODES = 1_000_000  # 20 000 tensors take 700 000
MAX_PICKLE = 32 << 20  # bytes; an SDXL checkpoint's has some 600 KB


class Unsound(Exception):
    """A pickle that is refused; the message completes a sentence that begins `it has`."""


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function in a GLOBAL opcode, never imported."""

    name: str
    """Module and name, such as `torch.FloatStorage`."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A flat array of numbers outside the pickle."""

    key: str
    dtype: str
    """safetensors' name of the dtype; U8 for untyped bytes."""
    size: int
    """Numbers of `dtype`."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor as a strided view of a storage; offset and strides count numbers of `dtype`. Not checked yet."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Inert:
    """An object of a class that is not rebuilt, with the values that were passed to it."""

    name: str
    parts: list[Any] = field(default_factory=list)


class _Mark:
    """The marker that the MARK opcode pushes."""


_MARK = _Mark()

Find = Callable[[str, str], Global]
Call = Callable[[Global, tuple[Any, ...]], Any]
Fetch = Callable[[Any], Storage | Global]


class PickleMachine:
    """One run over one pickle. `find`, `call` and `fetch` evaluate GLOBAL, REDUCE and BINPERSID."""

    def __init__(self, find: Find, call: Call, fetch: Fetch) -> None:
        self._find, self._call, self._fetch = find, call, fetch
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: BytesIO) -> Any:
        """Run from the current position of `file` to after STOP, and return the object. Raises Unsound."""
        for name, argument in _opcodes(file):
            if name == "STOP":
                return self._pop()
            step = self._STEPS.get(name)
            if step is None:
                raise Unsound(f"the opcode {name}, which no weights file needs")
            step(self, argument)
        raise Unsound("no end")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise Unsound("an opcode that takes more than there is")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                values = self._stack[index + 1 :]
                del self._stack[index:]
                return values
        raise Unsound("an opcode that looks for a mark where none is")

    def _top(self) -> Any:
        value = self._pop()
        self._push(value)
        return value

    def _pop_n(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _ignore(self, _: Any) -> None:
        """Ignore PROTO and FRAME."""

    def _constant(self, value: Any) -> None:
        self._push(value)

    def _text(self, value: str) -> None:
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise Unsound("text with half a character in it") from error
        self._push(value)

    def _old_text(self, value: str) -> None:
        """Push Python 2's bytes, which genops reads as Latin-1 and torch as UTF-8."""
        try:
            self._push(value.encode("latin-1").decode())
        except UnicodeError as error:
            raise Unsound("text that is not UTF-8") from error

    def _bytes(self, _: Any) -> None:
        self._push(Inert("bytes"))

    def _mark(self, _: Any) -> None:
        self._push(_MARK)

    def _drop(self, _: Any) -> None:
        if not self._stack:
            raise Unsound("an opcode that takes more than there is")
        self._stack.pop()

    def _drop_to_mark(self, _: Any) -> None:
        self._pop_to_mark()

    def _duplicate(self, _: Any) -> None:
        self._push(self._top())

    def _remember(self, index: Any) -> None:
        key = len(self._memo) if index is None else int(index)
        if not 0 <= key < 2**32:
            raise Unsound(f"a memo of {key.bit_length()} bits")
        self._memo[key] = self._top()

    def _recall(self, index: Any) -> None:
        if int(index) not in self._memo:
            raise Unsound(f"a look into memo {index}, where nothing is")
        self._push(self._memo[int(index)])

    def _append(self, _: Any) -> None:
        (value,) = self._pop_n(1)
        self._extend([value])

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Inert):
            target.parts += values
        elif isinstance(target, list):
            target += values
        else:
            raise Unsound(f"values that are appended to a {type(target).__name__}")

    def _set_item(self, _: Any) -> None:
        self._update(self._pop_n(2))

    def _set_items(self, _: Any) -> None:
        self._update(self._pop_to_mark())

    def _update(self, flat: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Inert):
            target.parts += flat
        elif isinstance(target, dict):
            target |= _dict(flat)
        else:
            raise Unsound(f"items that are set in a {type(target).__name__}")

    def _stack_global(self, _: Any) -> None:
        module, name = self._pop_n(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise Unsound("a global whose name is no text")
        self._push(self._find(module, name))

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push(self._find(module, name))

    def _reduce(self, _: Any) -> None:
        function, arguments = self._pop_n(2)
        self._push(self._call(_as_global(function), _as_tuple(arguments)))

    def _new_object(self, _: Any) -> None:
        self._reduce(None)

    def _new_object_ex(self, _: Any) -> None:
        cls, arguments, named = self._pop_n(3)
        self._push(Inert(_as_global(cls).name, [*_as_tuple(arguments), named]))

    def _build(self, _: Any) -> None:
        """Drop state that changes no value: an OrderedDict's `_metadata`, a tensor's attributes."""
        (state,) = self._pop_n(1)
        target = self._top()
        if isinstance(target, Inert):
            target.parts.append(state)

    def _persistent(self, _: Any) -> None:
        self._push(self._fetch(self._pop()))

    _STEPS: ClassVar[dict[str, Callable[[Any, Any], None]]] = {
        **dict.fromkeys(("PROTO", "FRAME"), _ignore),
        **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _constant),
        **dict.fromkeys(("FLOAT", "BINFLOAT"), _constant),
        **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING"), _text),
        **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), _old_text),
        **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _bytes),
        **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _remember),
        **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _recall),
        "NONE": lambda self, _: self._push(None),
        "NEWTRUE": lambda self, _: self._push(True),
        "NEWFALSE": lambda self, _: self._push(False),
        "MARK": _mark,
        "POP": _drop,
        "POP_MARK": _drop_to_mark,
        "DUP": _duplicate,
        "EMPTY_TUPLE": lambda self, _: self._push(()),
        "TUPLE": lambda self, _: self._push(tuple(self._pop_to_mark())),
        "TUPLE1": lambda self, _: self._push(tuple(self._pop_n(1))),
        "TUPLE2": lambda self, _: self._push(tuple(self._pop_n(2))),
        "TUPLE3": lambda self, _: self._push(tuple(self._pop_n(3))),
        "EMPTY_LIST": lambda self, _: self._push([]),
        "EMPTY_SET": lambda self, _: self._push([]),
        "LIST": lambda self, _: self._push(self._pop_to_mark()),
        "FROZENSET": lambda self, _: self._push(self._pop_to_mark()),
        "APPEND": _append,
        "APPENDS": _appends,
        "ADDITEMS": _appends,
        "EMPTY_DICT": lambda self, _: self._push({}),
        "DICT": lambda self, _: self._push(_dict(self._pop_to_mark())),
        "SETITEM": _set_item,
        "SETITEMS": _set_items,
        "GLOBAL": _global,
        "STACK_GLOBAL": _stack_global,
        "REDUCE": _reduce,
        "NEWOBJ": _new_object,
        "NEWOBJ_EX": _new_object_ex,
        "BUILD": _build,
        "BINPERSID": _persistent,
    }


def _opcodes(file: BytesIO) -> Iterator[tuple[str, Any]]:
    opcodes = pickletools.genops(file)
    for _ in range(MAX_OPCODES):
        try:
            opcode, argument, _ = next(opcodes)
        except StopIteration:
            return
        except (ValueError, UnicodeError, OverflowError, MemoryError) as error:
            raise Unsound(f"bytes that are no pickle ({error})") from error
        yield opcode.name, argument
    raise Unsound(f"more than {MAX_OPCODES} opcodes")


def _dict(flat: list[Any]) -> dict[Any, Any]:
    if len(flat) % 2:
        raise Unsound("a key without a value")
    return dict(zip(map(as_key, flat[::2]), flat[1::2], strict=True))


def as_key(key: Any) -> Any:
    """Return `key` if it may be a dict's key: its hash must not be the author's choice, as collisions make a dict slow.

    Python hashes text with a secret; an integer is its own hash, but from 61 bits on integers collide. Raises Unsound.
    """
    is_number = isinstance(key, int) and key.bit_length() <= 61
    is_words = isinstance(key, tuple) and all(isinstance(word, str) for word in key)
    if is_number or is_words or key is None or isinstance(key, str | Global | Inert | View):
        return key
    raise Unsound(f"a {type(key).__name__} as a key that cannot be one")


def _as_global(value: Any) -> Global:
    if not isinstance(value, Global):
        raise Unsound(f"a call of a {type(value).__name__}")
    return value


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise Unsound(f"a call with a {type(value).__name__} for arguments")
    return value
