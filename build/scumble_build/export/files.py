"""Files that other processes may read at any time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_by_rename(file: Path, content: bytes | memoryview) -> None:
    """Readers see the old file or the whole new one. Raises OSError; then the old one is still there."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
