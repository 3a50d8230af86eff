"""Measures the time from a request to its first step for each kind of adapter, cold (not in memory) and warm."""

from __future__ import annotations

import queue
import random
import statistics
import tempfile
import time
from pathlib import Path

from scumble.events import Done, Event, Failed, Step
from scumble.request import Request
from scumble_registry import Registry
from scumble_server.config import ServerConfig
from scumble_server.service import Service
from support.every_kind import EveryKind, publish_every_kind, request_for, ways_to_ask

SIDE = 128


def first_steps(base: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return median milliseconds. Every cold request is sent to a server that has just started, with its base loaded.

    The warm one uses the same adapter with another prompt, so its text is encoded again.
    """
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        with Registry.open(home, create=True) as registry:
            every = publish_every_kind(registry, base, Path(folder) / "kinds", image_side=SIDE)
        names = ["bare", *ways_to_ask(random.Random(0))]
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(rounds + 1):
            for name in names:
                service = Service.open(ServerConfig(home=home, base=every.base))
                _to_first_step(service, _request(every, "bare", "something else"))  # the base's first call
                seconds[name].append(
                    (
                        _to_first_step(service, _request(every, name, "a red apple")),
                        _to_first_step(service, _request(every, name, "a blue boat")),
                    )
                )
                service.close()
    return {
        name: {
            "cold_ms": round(statistics.median(cold for cold, _ in measured[1:]) * 1e3, 1),
            "warm_ms": round(statistics.median(warm for _, warm in measured[1:]) * 1e3, 1),
        }
        for name, measured in seconds.items()
    }


def _request(every: EveryKind, name: str, prompt: str) -> Request:
    way = {} if name == "bare" else ways_to_ask(random.Random(0))[name]
    adapters = (
        [] if name == "bare" else [{"ref": name, **way, "start": 0.0} if "start" in way else {"ref": name, **way}]
    )
    return request_for(every, adapters, prompt=f"{prompt} <bad>", seed=1, steps=2, width=SIDE, height=SIDE)


def _to_first_step(service: Service, request: Request) -> float:
    events: queue.Queue[Event] = queue.Queue()
    start = time.perf_counter()
    first = 0.0
    service.submit(request, events.put)
    while not isinstance(event := events.get(), Done | Failed):
        if isinstance(event, Step) and not first:
            first = time.perf_counter() - start
    if isinstance(event, Failed):
        raise event.error
    return first
