"""A service in this process, whose latents can be seen."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scumble.events import Done, Event, Failed
from scumble.request import Request
from scumble_server.executors.protocol import Executor
from scumble_server.service import Service


@dataclass
class Result:
    done: Done
    latents: Tensor


@dataclass
class Running:
    """A service whose latents can be seen just before they are decoded."""

    service: Service
    home: Path
    files: dict[str, Path]
    last: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        decode = self.service._decode

        def watched(job: Any) -> Done:
            self.last[:] = [torch.stack([image.sample for image in job.active.images])]
            return decode(job)

        self.service._decode = watched  # type: ignore[method-assign]

    @property
    def executor(self) -> Executor:
        """That of the base."""
        return self.executor_of(self.service.bases[0].version.name)

    def executor_of(self, base: str) -> Executor:
        with self.service._weights.open() as lease:
            return next(each for each in self.service.bases if each.version.name == base).executor(lease)

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """All at once; results in the order of the requests. Raises the first failure."""
        results: queue.Queue[tuple[int, Event, list[Tensor]]] = queue.Queue()
        for index, request in enumerate(requests):

            def on_event(event: Event, index: int = index) -> None:
                if isinstance(event, Done | Failed):
                    results.put((index, event, list(self.last)))

            self.service.submit(request, on_event)
        found: dict[int, Result] = {}
        for _ in requests:
            index, event, last = results.get(timeout=120)
            if isinstance(event, Failed):
                raise event.error
            assert isinstance(event, Done)
            found[index] = Result(event, last[0])
        return [found[index] for index in range(len(requests))]
