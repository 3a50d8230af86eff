"""Threads of a server take turns soon."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scumble_registry import Registry
from scumble_server.config import ServerConfig
from scumble_server.service import Service
from scumble_server.switching import INTERVAL, switch_often


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


def test_a_service_lets_the_threads_of_its_process_take_turns_sooner(tmp_path: Path, tiny_base: Path) -> None:
    with Registry.open(tmp_path, create=True) as registry:
        registry.publish(tiny_base, name="tiny/base")
    sys.setswitchinterval(0.005)
    Service.open(ServerConfig(home=tmp_path, base="tiny/base", executor="torch")).close()
    assert sys.getswitchinterval() == pytest.approx(INTERVAL, rel=0.02)


def test_a_process_that_switches_sooner_already_keeps_its_interval() -> None:
    sys.setswitchinterval(1e-4)
    switch_often()
    assert sys.getswitchinterval() == pytest.approx(1e-4, rel=0.02)
