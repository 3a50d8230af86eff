"""The allow-list of globals in weights files, and how each is read. Nothing is imported or called.

From files of torch.save, the webui, textual inversion and Lightning. There are three cases:

* a function of torch that rebuilds a tensor is read as its result, a View;
* a class that is not rebuilt (a callback, a path, a config) becomes an Inert placeholder;
* all else is refused by name: every function, and the standard library's classes but for a few that hold data.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from scumble_registry.formats.pickled.machine import Global, Inert, Storage, Unsound, View, as_key

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's and protocol 2's names
_CLASS = re.compile(r"_*[A-Z]\w{0,99}(\.[A-Z]\w{0,99})*", re.ASCII)
_MODULE = re.compile(r"[A-Za-z_]\w{0,99}(\.[A-Za-z_]\w{0,99}){0,20}", re.ASCII)
_HARMLESS = frozenset(
    {
        *(
            f"builtins.{name}"
            for name in ("set", "frozenset", "list", "dict", "tuple", "bytearray", "complex", "slice")
        ),
        *(f"builtins.{name}" for name in ("int", "float", "str", "bool", "bytes", "object")),
        *(f"collections.{name}" for name in ("OrderedDict", "defaultdict", "Counter", "deque")),
        *(f"pathlib.{kind}{name}" for kind in ("", "Pure") for name in ("Path", "PosixPath", "WindowsPath")),
        *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
        "_codecs.encode",  # how protocol 2 writes bytes
        "argparse.Namespace",
        "copyreg._reconstructor",
        "decimal.Decimal",
        "fractions.Fraction",
        "types.SimpleNamespace",
        "uuid.UUID",
        *(f"numpy.{name}" for name in ("dtype", "ndarray")),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        *(f"torch.{name}" for name in (*_DTYPES, *_STORAGES, "device", "strided", "complex64", "complex128")),
        *(f"torch.{name}" for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")),
        *(f"torch.storage.{name}" for name in ("UntypedStorage", "TypedStorage")),
    }
)


def find(module: str, name: str) -> Global:
    """Return the global if it is allowed. Raises Unsound, naming it, if not."""
    module = _OLD_MODULES.get(module, module)
    word = f"{module}.{name}"
    if word in _HARMLESS or word in _CALLS:
        return Global(word)
    top = module.partition(".")[0]
    is_class = _CLASS.fullmatch(name) and _MODULE.fullmatch(module)
    if not is_class or top in sys.stdlib_module_names:
        raise Unsound(f"{word[:200]!a} in it, which no weights file needs: it was not run")
    return Global(word)


def call(function: Global, arguments: tuple[Any, ...]) -> Any:
    """Return the result of `function(*arguments)` as data, without calling it. Raises Unsound."""
    meaning = _CALLS.get(function.name)
    if meaning is None:
        return Inert(function.name, list(arguments))
    try:
        return meaning(*arguments)
    except TypeError as error:  # another number of arguments
        raise Unsound(f"a call of {function.name} with {len(arguments)} arguments") from error


def fetch(words: Any) -> Storage | Global:
    """Read a persistent id: ('storage', type, key, device, size[, None]) or ('module', class, file, source code).

    The sixth item of a storage (its view, always None) and modules are in the old format only. Raises Unsound.
    """
    match words:
        case ("module", Global() as cls, _, _):
            return cls
        case ("storage", Global(name), str(key), _, int(size)) | (
            "storage",
            Global(name),
            str(key),
            _,
            int(size),
            None,
        ):
            dtype = _STORAGES.get(name.rpartition(".")[2])
            if dtype is not None and name.startswith("torch.") and not isinstance(size, bool):
                return Storage(key, dtype, size)
            raise Unsound(f"numbers of the type {name}; floating point and whole numbers up to 64 bits can be read")
    raise Unsound("a reference to something outside that is no storage")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> View:
    """Read `_rebuild_tensor(_v2)`; `more` are requires_grad, hooks, and the negation and conjugation bits."""
    if len(more) > 2 and more[2]:
        raise Unsound("a tensor with a negation or conjugation that is not carried out yet; save a clone of it")
    dtype = storage.dtype if isinstance(storage, Storage) else ""
    return _view(storage, dtype, offset, shape, strides)


def _tensor_with_dtype(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, bits: Any = None
) -> View:
    """Read `_rebuild_tensor_v3`, whose storage is untyped bytes."""
    name = dtype.name if isinstance(dtype, Global) else "nothing"
    known = _DTYPES.get(name.removeprefix("torch."))
    if known is None or bits:
        raise Unsound(f"numbers of the type {name}; floating point and whole numbers up to 64 bits can be read")
    return _view(storage, known, offset, shape, strides)


def _view(storage: Any, dtype: str, offset: Any, shape: Any, strides: Any) -> View:
    if not isinstance(storage, Storage):
        raise Unsound("a tensor without numbers")
    if not (_are_counts((offset,)) and _are_counts(shape) and _are_counts(strides)):
        raise Unsound("a tensor without a sound place, shape and strides")
    return View(storage, dtype, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *_: Any) -> View:
    if not isinstance(data, View):
        raise Unsound("a parameter without a tensor")
    return data


def _of_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    """Read `_rebuild_from_type_v2`: a tensor with attributes, or of a subclass."""
    if not isinstance(function, Global) or function.name not in _TENSORS or not isinstance(arguments, tuple):
        raise Unsound("a tensor of a class that is not known")
    return call(function, arguments)


def _ordered(*items: Any) -> dict[Any, Any]:
    pairs = items[0] if items else []
    if len(items) > 1 or not isinstance(pairs, list):
        raise Unsound("a dict of something else than pairs")
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise Unsound("a dict of something else than pairs")
    return {as_key(key): value for key, value in pairs}


def _default_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _listed(*values: Any) -> list[Any]:
    items = values[0] if values else []
    if len(values) > 1 or not isinstance(items, list | tuple):
        raise Unsound("a set of something else than values")
    return list(items)


def _size(values: Any) -> tuple[Any, ...]:
    return tuple(_listed(values))


def _refuse_bytes(*_: Any) -> Any:
    raise Unsound("a tensor that was pickled without torch.save, a file within a file; save it with torch.save")


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.storage._load_from_bytes": _refuse_bytes,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _default_dict,
    "builtins.set": _listed,
    "builtins.frozenset": _listed,
}
_TENSORS = frozenset(name for name in _CALLS if name.startswith("torch._utils."))


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple | list) and all(type(value) is int and 0 <= value < 2**48 for value in values)
