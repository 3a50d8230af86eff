"""Explains errors of writing files; safetensors and torch have their own for a full disk."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from scumble.files import explain_os_errors

_TORCH = re.compile(r"inline_container|PytorchStreamWriter")  # torch.save's own writer


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, missing permission or a file in place of a folder into Unavailable, naming the path."""
    with explain_os_errors(path):
        try:
            yield
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        except RuntimeError as error:
            if not _TORCH.search(str(error)):
                raise
            raise OSError(errno.EIO, "the file could not be written completely", str(path)) from error
