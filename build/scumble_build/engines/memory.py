"""How much memory this process took at its peak, as the kernel counts it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS, _REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """`with Peak() as peak: …`, then `peak.bytes`: the largest resident size within the block.

    Where the kernel does not let it begin anew, of the process so far; 0 where there is no /proc.
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
            found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
            self.bytes = int(found[1]) * 1024 if found else 0
