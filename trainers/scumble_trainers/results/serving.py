"""Draws images by a Scumble server from a base and adapters that are published to a temporary registry."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from scumble.client import Client
from scumble.local import local_server
from scumble.request import Request
from scumble_registry import Registry
from scumble_registry.results import publish_result
from scumble_trainers.base import TrainingBase

BASE = "trained/base"
HOME = "SCUMBLE_HOME"
_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Served:
    """A running server. Any thread may call it."""

    client: Client

    def draw(self, requests: Sequence[Request]) -> list[Image.Image]:
        """Draw one image per request, in order. Requests are sent concurrently, so they share batches."""
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            drawn = threads.map(lambda request: self.client.images.generate(request).pil()[0], requests)
            return list(drawn)


@contextmanager
def served(base: TrainingBase, results: Mapping[str, Path] | None = None, url: str | None = None) -> Iterator[Served]:
    """Yield the server at `url`, or a new one with the base and the adapters in finished runs' folders, by name.

    Raises Unavailable if no server is installed, and errors of publishing.
    """
    if url is not None:
        with Client(url) as client:
            yield Served(client)
        return
    with tempfile.TemporaryDirectory(prefix="scumble-train-") as home:
        with Registry.open(Path(home), create=True) as registry:
            registry.publish(base.folder, BASE)
            for name, out in (results or {}).items():
                publish_result(registry, out, name, base=BASE)
        with _home(home), local_server(BASE) as address, Client(address) as client:
            yield Served(client)


@contextmanager
def _home(home: str) -> Iterator[None]:
    before = os.environ.get(HOME)
    os.environ[HOME] = home
    try:
        yield
    finally:
        if before is None:
            del os.environ[HOME]
        else:
            os.environ[HOME] = before
