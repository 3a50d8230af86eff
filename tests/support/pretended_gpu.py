"""A pretended GPU: tensors of device `gpu:0` compute on the CPU, but mixing devices raises as CUDA does.

Copies between host and device, and what waits for the device, are noted with the line of ours that did them. Threads
take part while they are within `Watching`, which stands for their stream (`executors.cuda.own_stream`).

The device is torch's PrivateUse1, renamed. A few functions of torch cannot know it and are replaced while `pretended`
lasts: `inference_mode`, which its tensors do not survive, `torch.tensor`, and `Module.to`.
"""

from __future__ import annotations

import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self
from unittest.mock import patch

import diffusers
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from scumble_build.graphs.models import Models

_setup_privateuseone_for_python_backend("gpu")
GPU = torch.device("gpu:0")
UPLOAD, DOWNLOAD, WAIT = "copy to the device", "copy to the host", "wait for the device"
BESIDE = "copy that nobody waits for"
WAITING = ("nonzero", "_local_scalar_dense", "masked_select", "is_nonzero", "unique", "repeat_interleave.Tensor")
"""Operators whose result's size or value the host needs."""


_alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
_alive_lock = threading.RLock()


class DeviceTensor(Tensor):
    """A tensor on the pretended device; `values` has its numbers."""

    values: Tensor

    @staticmethod
    def __new__(cls: type[Self], values: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=GPU,
        )
        made.values = values
        with _alive_lock:
            _alive[id(made)] = made
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        return DeviceTensor(_tensor(data, dtype=dtype or self.dtype))

    def tolist(self) -> Any:
        _note(WAIT)
        return self.values.tolist()

    def numpy(self) -> Any:  # type: ignore[override]
        raise TypeError("can't convert gpu:0 device type tensor to numpy. Use Tensor.cpu() first")

    def pin_memory(self) -> Tensor:  # type: ignore[override]
        raise RuntimeError("cannot pin 'gpu:0', only dense CPU tensors can be pinned")


def tensors_on_device() -> list[Tensor]:
    """All that there are."""
    with _alive_lock:
        return list(_alive.values())


class Watching(TorchDispatchMode):
    """In it a thread uses the device. `notes`: what was copied or waited for, by kind and line."""

    notes: Counter[tuple[str, str]]

    def __init__(self) -> None:
        super().__init__()
        self.notes = Counter()

    def __enter__(self) -> Self:
        _watching.of_thread = self
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: object) -> None:
        _watching.of_thread = None
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


_watching = threading.local()
_tensor = torch.tensor


def _note(kind: str) -> None:
    watching: Watching | None = getattr(_watching, "of_thread", None)
    if watching is not None:
        watching.notes[kind, _line()] += 1


def _line() -> str:
    """The innermost line of the product."""
    for frame in reversed(traceback.extract_stack()):
        if "/scumble_" in frame.filename:
            return f"{frame.filename.rpartition('/scumble_')[2]}:{frame.lineno} {frame.name}"
    return "?"


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = str(function)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_device = [tensor for tensor in given if isinstance(tensor, DeviceTensor)]
    asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    is_copy = "_to_copy" in name or name.startswith("aten.copy_")
    strangers = [tensor for tensor in given if not isinstance(tensor, DeviceTensor) and tensor.dim() > 0]
    if on_device and strangers and not is_copy:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, gpu:0 and cpu! ({name}, "
            f"{_line()}, {[tuple(tensor.shape) for tensor in strangers]})"
        )
    goes_to_device = asked == "gpu" or (bool(on_device) and asked != "cpu")
    if on_device and any(waiting in name for waiting in WAITING):
        _note(WAIT)
    if is_copy:
        source = given[1] if name.startswith("aten.copy_") else given[0]
        target = isinstance(given[0], DeviceTensor) if name.startswith("aten.copy_") else goes_to_device
        if isinstance(source, DeviceTensor) != target:
            beside = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
            _note(BESIDE if beside else UPLOAD if target else DOWNLOAD)
    plain = {**kwargs, **({"device": torch.device("cpu")} if asked == "gpu" else {}), "pin_memory": False}
    plain = {key: value for key, value in plain.items() if key in kwargs}
    result = function(*tree_map(_plain, args), **tree_map(_plain, plain))
    check: Check | None = getattr(_watching, "check", None)
    if check is not None:
        check(name, given, [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
    if _is_in_place(name, args):
        return args[0]
    if "_local_scalar_dense" in name or not goes_to_device:
        return result
    return tree_map(lambda each: DeviceTensor(each) if type(each) is Tensor else each, result)


Check = Callable[[str, list[Tensor], list[Tensor]], None]
"""Gets each operator's name, its tensors, and those that it returned."""


@contextmanager
def check_operators(check: Check) -> Iterator[None]:
    """Call `check` for every operator of this thread."""
    _watching.check = check
    try:
        yield
    finally:
        _watching.check = None


def _plain(value: Any) -> Any:
    return value.values if isinstance(value, DeviceTensor) else value


def _is_in_place(name: str, args: Any) -> bool:
    operator = name.split(".")[1]
    return operator.endswith("_") and not operator.endswith("__") and bool(args) and isinstance(args[0], Tensor)


def _enter_no_grad(mode: Any) -> None:
    mode.was_enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(False)


def _exit_no_grad(mode: Any, *_error: object) -> None:
    torch.set_grad_enabled(mode.was_enabled)


def _make_tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    made = _tensor(data, *args, **kwargs)
    return made if device is None else made.to(device)


_module_to = torch.nn.Module.to


def _move_module(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """In the place of `Module.to`, which cannot put such tensors into parameters."""
    device, dtype, layout = kwargs.get("device"), kwargs.get("dtype"), kwargs.get("memory_format")
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        else:
            device = value
    if device is None or torch.device(device).type != "gpu":
        return _module_to(module, *args, **kwargs)
    for each in module.modules():
        for own, wrap in ((each._parameters, _parameter), (each._buffers, lambda tensor: tensor)):
            for name, tensor in own.items():
                if tensor is not None:
                    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                    moved = _plain(tensor.detach()).to(wanted)
                    moved = moved.to(memory_format=layout) if layout is not None and moved.ndim == 4 else moved
                    own[name] = wrap(DeviceTensor(moved))
    return module


def _parameter(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _with_positions(module: torch.nn.Module) -> None:
    """Position ids are in no file: transformers makes them anew, which modes get in the way of."""
    for each in module.modules():
        ids = each._buffers.get("position_ids")
        if ids is not None:
            positions = torch.arange(ids.shape[-1])[None]
            each._buffers["position_ids"] = DeviceTensor(positions) if isinstance(ids, DeviceTensor) else positions


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Pretend that this machine has a GPU; yield its device."""
    load = Models.load

    def load_models(*args: Any, **kwargs: Any) -> Models:
        with _disable_current_modes():
            models = load(*args, **kwargs)
        for text in models.texts.values():
            _with_positions(text)
        return models

    with (
        patch.object(torch.inference_mode, "__enter__", _enter_no_grad),
        patch.object(torch.inference_mode, "__exit__", _exit_no_grad),
        patch.object(torch, "tensor", _make_tensor),
        patch.object(torch.nn.Module, "to", _move_module),
        patch.object(diffusers.ModelMixin, "to", _move_module),
        patch.object(transformers.PreTrainedModel, "to", _move_module),
        patch.object(Models, "load", load_models),
    ):
        yield GPU
