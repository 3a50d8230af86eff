"""Files that could not be written: safetensors and torch have errors of their own for a full disk."""

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
def explain_write_errors(place: Path) -> Iterator[None]:
    """No room, no permission, a file where a folder should be: Unavailable, naming the place."""
    with explain_os_errors(place):
        try:
            yield
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(place)) from error
        except RuntimeError as error:
            if not _TORCH.search(str(error)):
                raise
            raise OSError(errno.EIO, "the file could not be written whole", str(place)) from error
