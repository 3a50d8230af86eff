"""Names the version whose weights cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from scumble.errors import Refused
from scumble_registry import Version


@contextmanager
def loading(version: Version, part: str = "") -> Iterator[None]:
    """Raise a Refused that names `version`, and `part` of it, in place of one that names only tensors."""
    try:
        yield
    except Refused as error:
        of = f"{part} of " if part else ""
        raise type(error)(
            f"{of}{version.ref} ({version.digest}) cannot be loaded: {error.message}",
            **{**error.fields, "ref": version.ref, "digest": version.digest},
        ) from error
