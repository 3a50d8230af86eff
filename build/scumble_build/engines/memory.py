"""Peak memory of this process, as the Linux kernel counts it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS, _REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Measures the largest resident size within a block: `with Peak() as peak: …`, then `peak.bytes`.

    If the kernel does not allow resetting the peak, it is that of the whole process so far; without /proc it is 0.
    """

    bytes: int = 0

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            _REFS.write_text("5")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
            self.bytes = int(match[1]) * 1024 if match else 0
