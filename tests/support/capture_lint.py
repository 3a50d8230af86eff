"""A capture on the pretended GPU that refuses what a CUDA graph could not hold, or would hold unseen.

While work is captured, and at each replay, which computes it again, an operator must not wait for the device, nor read
a host tensor; and what it reads was made by the work itself, or is a parameter or a `torch.nn.Buffer`, or lies in a
fixed buffer. Anything else would be read at the same address in every replay, whoever's it is by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from scumble_server.executors.device import Buffers
from support.pretended_gpu import WAITING, DeviceTensor, check_operators, tensors_on_device

T = TypeVar("T")


@dataclass
class LintedCapture:
    """As `CudaCapture`. `faults` are what was found: the product goes on without graphs where a capture fails."""

    replayed: int = 0
    faults: list[str] = field(default_factory=list)
    _buffers: list[Buffers] = field(default_factory=list)

    def of(self, buffers: Buffers) -> None:
        """Take into account what these hold."""
        self._buffers.append(buffers)

    def __call__(self, work: Callable[[], T]) -> Callable[[], T]:
        fixed = _fixed()

        def compute() -> T:
            try:
                return _linted(work, fixed | self._held())
            except AssertionError as error:
                self.faults.append(str(error))
                raise

        def replay() -> T:
            self.replayed += 1
            return compute()

        compute()
        return replay

    def _held(self) -> set[int]:
        return {_storage(held) for buffers in self._buffers for held in buffers._held.values()}


def _fixed() -> set[int]:
    return {_storage(each) for each in tensors_on_device() if isinstance(each, nn.Parameter | nn.Buffer)}


def _linted(work: Callable[[], T], allowed: set[int]) -> T:
    made: dict[int, Tensor] = {}

    def check(name: str, given: list[Tensor], results: list[Tensor]) -> None:
        if any(waiting in name for waiting in WAITING):
            raise AssertionError(f"{name} waits for the device while a step is captured")
        for tensor in given:
            if not isinstance(tensor, DeviceTensor):
                assert tensor.dim() == 0, f"{name} reads a host tensor while a step is captured"
            else:
                storage = _storage(tensor)
                assert storage in allowed or storage in made, (
                    f"{name} reads {tuple(tensor.shape)} from outside of a captured step, which is in no fixed buffer"
                )
        made.update((_storage(result), result) for result in results)  # kept, so that no address comes again

    with check_operators(check):
        return work()


def _storage(tensor: Tensor) -> int:
    values = tensor.values if isinstance(tensor, DeviceTensor) else tensor
    return values.untyped_storage().data_ptr()
