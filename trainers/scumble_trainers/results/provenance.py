"""Provenance of an adapter and the cost of its training, as in its manifest."""

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
    """Cost of a whole run, over all its resumptions."""

    seconds: float
    peak_memory: int  # bytes: of the CUDA device if there is one, else of the process
    device: str

    def and_then(self, later: Cost) -> Cost:
        """Add the costs of two parts of a run."""
        return Cost(self.seconds + later.seconds, max(self.peak_memory, later.peak_memory), later.device)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Everything that is needed to train the adapter again and to check the result."""

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
    """Return the provenance of a run, with the versions of the installed libraries."""
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
    """Return the versions of Python and of every library that is installed."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes so far: of the CUDA allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """Return the device's name: the GPU, or the kind of CPU and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
