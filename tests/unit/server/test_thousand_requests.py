"""A thousand random requests with loads and evictions: the base's weights stay as they were, and memory stays flat."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from scumble_registry import Registry
from support.every_kind import publish_every_kind, random_request

if TYPE_CHECKING:
    from support.running import Running

FEW = 6 << 20
"""Bytes: room for a few of the adapters, so that they push each other out."""


def test_a_thousand_requests_leave_the_base_and_memory_as_they_were(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Running]
) -> None:
    home = tmp_path_factory.mktemp("thousand")
    with Registry.open(home, create=True) as registry:
        every = publish_every_kind(registry, tiny_base, tmp_path_factory.mktemp("kinds"))
    running = start(
        home, every.base, every.files, max_batch_images=16, device_cache_bytes=FEW, host_cache_bytes=FEW // 4
    )
    digest = running.executor.weights_digest()
    rng, resident = random.Random(0), []
    for _ in range(40):
        running.run([random_request(every, rng, most=3, steps=rng.choice([1, 2, 3])) for _ in range(25)])
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    stats = running.service.stats()
    after = running.executor.weights_digest()
    running.service.close()
    assert stats.requests == 1000
    assert stats.failed == stats.failed_steps == 0
    assert stats.device_cache.evictions > 100
    assert stats.host_cache.evictions > 10
    assert stats.device_cache.held_bytes == 0
    assert after == digest
    assert abs(resident[39] / resident[19] - 1) <= 0.02
