"""Where an adapter comes from and what it cost, as its manifest tells it."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

LIBRARIES = ("scumble", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a whole run, over all its resumptions."""

    seconds: float
    peak_memory: int  # bytes: of the device where there is one, else of the process
    device: str

    def and_then(self, later: Cost) -> Cost:
        """Both stretches of a run together."""
        return Cost(self.seconds + later.seconds, max(self.peak_memory, later.peak_memory), later.device)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Enough to make the adapter again, and to tell whether it was."""

    trainer: str
    config: Mapping[str, Any]
    data_digest: str
    pictures: int
    seed: int
    parent: str
    time: float  # seconds
    peak_memory: int  # bytes
    device: str
    libraries: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def provenance(
    trainer: str,
    *,
    config: Mapping[str, Any],
    data_digest: str,
    pictures: int,
    seed: int,
    parent: str,
    cost: Cost,
) -> Provenance:
    """With the libraries that are installed now."""
    return Provenance(
        trainer=trainer,
        config=dict(config),
        data_digest=data_digest,
        pictures=pictures,
        seed=seed,
        parent=parent,
        time=round(cost.seconds, 1),
        peak_memory=cost.peak_memory,
        device=cost.device,
        libraries=library_versions(),
    )


def library_versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Version of every installed library, and of Python."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: on a CUDA device by its allocator, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """For people: the card's name, or how many threads of which kind of processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
