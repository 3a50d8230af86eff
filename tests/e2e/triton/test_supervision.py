"""Processes die, and the server is still there; the server ends, and nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from scumble import Client
from scumble_server.config import ServerConfig
from scumble_server.triton.running import RunningServer, running_server

MODELS = ("scumble_stream", "scumble")


@pytest.fixture(scope="module")
def mortal(config: ServerConfig) -> Iterator[RunningServer]:
    """A server of its own, whose processes are killed here."""
    with running_server(config, start_timeout=300) as running:
        yield running


def server_processes(log: Path) -> list[psutil.Process]:
    """The processes of the server with this log, which has its shared-memory prefix as name."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and log.stem in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def process_of(log: Path, name: str) -> psutil.Process:
    """tritonserver, or the stub of the model `name`; a stub's command line names its model's file."""
    (process,) = (each for each in server_processes(log) if matches(each, name))
    return process


def matches(process: psutil.Process, name: str) -> bool:
    command = process.cmdline()
    if name == "tritonserver":
        return command[0].endswith("/tritonserver")
    return command[0].endswith("_stub") and f"/{name}/1/model.py" in command[1]


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [*MODELS, "tritonserver"])
def test_whatever_dies_the_server_comes_back(mortal: RunningServer, victim: str) -> None:
    restarts = mortal.supervisor.restarts
    process_of(mortal.log, victim).kill()
    wait_until(lambda: mortal.supervisor.restarts > restarts)
    with Client(mortal.grpc_url, timeout=120) as client:
        assert client.images.generate("a red apple", steps=1).images.shape == (1, 64, 64, 3)
    assert len(server_processes(mortal.log)) == 3


def readiness(server: RunningServer) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(f"{server.health_url}/readyz", timeout=5) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize("victim", ["scumble_stream", "tritonserver"])
def test_what_stops_is_not_ready_within_three_seconds_and_ready_when_it_answers_again(
    mortal: RunningServer, victim: str
) -> None:
    wait_until(lambda: readiness(mortal)[0] == 200)
    process = process_of(mortal.log, victim)
    process.suspend()
    try:
        time.sleep(3)
        status, body = readiness(mortal)
        assert status == 503
        assert "has not" in str(body["reason"])
    finally:
        process.resume()
    # Triton ends a stub that did not answer it in time; then the supervisor starts the server again.
    wait_until(lambda: readiness(mortal) == (200, {"ready": True}), 60)


def test_a_dead_process_is_not_ready_at_once(mortal: RunningServer) -> None:
    wait_until(lambda: readiness(mortal)[0] == 200)
    process_of(mortal.log, "scumble_stream").kill()
    wait_until(lambda: readiness(mortal)[0] == 503, 1)
    wait_until(lambda: readiness(mortal)[0] == 200)


def test_nobody_else_on_this_machine_can_read_what_it_holds(mortal: RunningServer) -> None:
    wait_until(lambda: readiness(mortal)[0] == 200)
    regions = list(Path("/dev/shm").glob(f"{mortal.log.stem}*"))
    assert regions
    files = [*regions, mortal.log]
    assert {oct(path.stat().st_mode & 0o077) for path in files} == {"0o0"}
    assert mortal.log.parent.stat().st_mode & 0o077 == 0


def test_a_server_that_hangs_is_killed(config: ServerConfig) -> None:
    with running_server(config, start_timeout=300) as running:
        os.kill(process_of(running.log, "tritonserver").pid, signal.SIGSTOP)
        running.supervisor.stop()
        assert not server_processes(running.log)
    assert not list(Path("/dev/shm").glob(f"{running.log.stem}*"))
