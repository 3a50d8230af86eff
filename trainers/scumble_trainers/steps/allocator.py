"""glibc gives every big block straight back to the kernel and asks for it again: half of a training step on a CPU."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, for the next step; nothing where the C library is another one."""
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, 1 << 25)  # the most that glibc takes
    library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
