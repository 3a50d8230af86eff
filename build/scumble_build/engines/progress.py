"""Progress and log of a build: TensorRT's phases as they run, and its messages for errors and the report."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from scumble_build.engines.api import TensorRT

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""Called with the name of the phase and the part of it that is done, 0…1."""

_SIZES = {
    "activation_bytes": re.compile(r"Total Activation Memory: (\d+) bytes"),
    "weights_bytes": re.compile(r"Total Weights Memory: (\d+) bytes"),
    "scratch_bytes": re.compile(r"Max Scratch Memory: (\d+) bytes"),
}


@dataclass
class BuildLog:
    """Messages of TensorRT's log: errors, warnings, and the bytes of device memory that the engine will take."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def note(self, severity: str, message: str) -> None:
        if severity in {"INTERNAL_ERROR", "ERROR"}:
            self.errors.append(message)
        elif severity == "WARNING":
            self.warnings.append(message)
        else:
            for name, pattern in _SIZES.items():
                if match := pattern.search(message):
                    self.memory[name] = self.memory.get(name, 0) + int(match[1])
        log.debug("%s: %s", severity, message)

    @property
    def ran_out_of_memory(self) -> bool:
        return any("out of memory" in error.lower() or "FAILED_ALLOCATION" in error for error in self.errors)


def logger(trt: TensorRT, messages: BuildLog) -> Any:
    """Make an ILogger that fills `messages`. It must outlive everything that is made with it."""

    class Logger(trt.ILogger):  # type: ignore[name-defined, misc] # a class of a module that is chosen at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.note(severity.name, message)

    return Logger()


def monitor(trt: TensorRT, progress: Progress) -> Any:
    """Make an IProgressMonitor that reports the outermost phases. If `progress` raises, the build stops."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.failed: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None or parent in self.steps:
                self.steps[phase] = max(steps, 1)

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if phase in self.steps:
                    progress(phase, (step + 1) / self.steps[phase])
            except BaseException as error:  # noqa: BLE001 - it may not pass through TensorRT; `build` raises it again
                self.failed = error
            return self.failed is None

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()
