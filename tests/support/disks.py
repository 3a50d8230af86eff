"""Disks as users have them: folders that may not be written, and a disk without a free byte."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_VERSION_3 = 0x20080522
_SYS_CAPGET, _SYS_CAPSET = {"x86_64": (125, 126), "aarch64": (90, 91)}.get(os.uname().machine, (0, 0))
_CAP_DAC_OVERRIDE = 1


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take away the right to write anything under `folder`, from root too."""
    modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")]}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        with _obeying_permissions():
            yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@contextmanager
def no_free_byte() -> Iterator[None]:
    """Let no file grow in this process, as on a full disk; empty files can be made."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def _obeying_permissions() -> Iterator[None]:
    """Take from this thread, if it is root's, the capability that passes permissions by (capabilities(7))."""
    if os.geteuid() != 0:
        yield
        return
    header = struct.pack("Ii", _VERSION_3, 0)
    before = ctypes.create_string_buffer(24)
    _call(_SYS_CAPGET, header, before)
    effective, *rest = struct.unpack("6I", before.raw)
    _call(_SYS_CAPSET, header, struct.pack("6I", effective & ~(1 << _CAP_DAC_OVERRIDE), *rest))
    try:
        yield
    finally:
        _call(_SYS_CAPSET, header, before)


def _call(number: int, *arguments: object) -> None:
    if _LIBC.syscall(number, *arguments) != 0:
        raise OSError(ctypes.get_errno(), "capabilities cannot be changed")
