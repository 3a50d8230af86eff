"""Draws every kind of request in a real Service on a device, and compares the pictures with those of one on the CPU."""

from __future__ import annotations

import queue
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scumble.events import Done, Event, Failed
from scumble.request import Request
from scumble_registry import Registry
from scumble_server.config import ServerConfig
from scumble_server.service import Service
from support.every_kind import publish_every_kind, request_for, ways_to_ask
from support.tiny_sd import make_tiny_base

FIELDS: dict[str, Any] = {
    "prompt": "an <bad> apple",
    "seed": 7,
    "steps": 4,
    "width": 64,
    "height": 64,
    "guidance_scale": 5.0,
    "scheduler": "euler_a",
}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "AND": {"prompt": "an apple AND a boat :0.7", "options": {"grammar": "webui"}},
    "hires": {"options": {"hires": {"scale": 2.0}}},
    "tiles": {"options": {"vae_tiling": True}},
}


def every_kind(device: str) -> dict[str, Any]:
    """Return the largest difference of a pixel (of 255) for each kind, alone and with strangers, or its error."""
    with tempfile.TemporaryDirectory(prefix="scumble-every-kind-") as folder:
        home = Path(folder) / "home"
        with Registry.open(home, create=True) as registry:
            every = publish_every_kind(registry, make_tiny_base(Path(folder) / "base"), Path(folder) / "files")
        asked = {
            name: request_for(every, [{"ref": name, **way}], **FIELDS)
            for name, way in ways_to_ask(random.Random(0)).items()
        } | {name: Request.parse({**FIELDS, **fields}) for name, fields in OTHERS.items()}
        config = ServerConfig(home=home, base="every/base", executor="torch")
        service, reference = Service.open(config.model_copy(update={"device": device})), Service.open(config)
        try:
            expected = {name: draw(reference, [request])[0] for name, request in asked.items()}
            alone = {name: draw(service, [request])[0] for name, request in asked.items()}
            together = dict(zip(asked, draw(service, list(asked.values())), strict=True))
        finally:
            service.close()
            reference.close()
    return {
        "alone": {name: _difference(alone[name], expected[name]) for name in asked},
        "together": {name: _difference(together[name], expected[name]) for name in asked},
    }


def draw(service: Service, requests: Sequence[Request]) -> list[Event]:
    """All at once; returns how each ended."""
    ends: queue.Queue[tuple[int, Event]] = queue.Queue()
    for index, request in enumerate(requests):
        service.submit(request, lambda event, index=index: ends.put((index, event)))  # type: ignore[misc]
    ended: dict[int, Event] = {}
    while len(ended) < len(requests):
        index, event = ends.get(timeout=120)
        if isinstance(event, Done | Failed):
            ended[index] = event
    return [ended[index] for index in range(len(requests))]


def _difference(one: Event, other: Event) -> int | str:
    if not isinstance(one, Done) or not isinstance(other, Done):
        return next(str(event.error) for event in (one, other) if isinstance(event, Failed))
    return int(np.abs(one.images.astype(int) - other.images.astype(int)).max())
