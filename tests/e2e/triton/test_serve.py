"""`scumble serve` as a process: what it prints, how it ends, and what it says when it cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from scumble import Client
from scumble.errors import Refused, ScumbleError

from .test_supervision import server_processes, wait_until

COMMAND = [str(Path(sys.executable).parent / "scumble"), "serve", "--json", "--threads", "1"]
FREE_PORTS = ["--grpc-port", "0", "--metrics-port", "0", "--health-port", "0", "--gateway-port", "0"]


def serve(home: Path, *options: str, base: str = "tiny/base", **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "--home", str(home), "--base", base, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@dataclass
class Served:
    process: subprocess.Popen[str]
    places: dict[str, Any]

    @property
    def log(self) -> Path:
        return Path(self.places["log"])

    def leaves_nothing(self) -> bool:
        return not server_processes(self.log) and not list(Path("/dev/shm").glob(f"{self.log.stem}*"))


@pytest.fixture
def served(home: Path) -> Iterator[Served]:
    process = serve(home, *FREE_PORTS, "--exit-with-parent")
    assert process.stdout
    try:
        yield Served(process, json.loads(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()


def test_it_serves_several_bases(home: Path) -> None:
    process = serve(home, *FREE_PORTS, "--exit-with-parent", "--base", "tiny/xl")
    assert process.stdout
    try:
        places = json.loads(process.stdout.readline())
        with Client(places["grpc"], timeout=120) as client:
            drawn = {base: client.images.generate("x", base=base, steps=2, seed=1) for base in (None, "tiny/xl")}
            with pytest.raises(Refused, match=r"serves tiny/base@1, tiny/xl@1, not l/a@1"):
                client.images.generate("x", base="l/a")
            assert client.stats().bases == ["tiny/base@1", "tiny/xl@1"]
    finally:
        process.terminate()
        process.wait(60)
    assert [each.receipt.base.name for each in drawn.values()] == ["tiny/base", "tiny/xl"]
    assert [each.images.shape for each in drawn.values()] == [(1, 64, 64, 3)] * 2


def test_its_gateway_draws_and_without_one_there_is_none(served: Served, home: Path) -> None:
    asked = {"prompt": "x", "steps": 2, "width": 64, "height": 64}
    answer = httpx.post(f"{served.places['gateway']}/v1/generate", json=asked, timeout=60)
    assert answer.status_code == 200
    assert httpx.get(f"{served.places['gateway']}/readyz").status_code == 200
    port = served.places["gateway"].rpartition(":")[2]
    taken = refused(serve(home, *FREE_PORTS[:-2], "--gateway-port", port), 6)
    assert f"gateway port {port}" in taken["message"]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_cleanly_in_the_middle_of_work(served: Served, ending: signal.Signals) -> None:
    assert served.places["ready"] is True
    outcomes: list[Any] = []

    def work(steps: int) -> None:
        try:
            with Client(served.places["grpc"], timeout=120) as client:
                outcomes.append(client.images.generate("x", steps=steps))
        except ScumbleError as error:
            outcomes.append(error)

    workers = [Thread(target=work, args=(990,)) for _ in range(10)]
    for worker in workers:
        worker.start()
    with Client(served.places["grpc"]) as client:
        wait_until(lambda: client.stats().open_requests == 10)
    served.process.send_signal(ending)
    assert served.process.wait(60) == 0
    for worker in workers:
        worker.join(10)
    assert [outcome.code for outcome in outcomes] == ["unavailable"] * 10
    assert served.leaves_nothing()


def test_killed_it_takes_its_server_along(served: Served) -> None:
    assert len(server_processes(served.log)) == 3
    served.process.kill()
    wait_until(served.leaves_nothing)


def refused(process: subprocess.Popen[str], status: int) -> dict[str, Any]:
    """The error that the command ends with."""
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == status, output + errors
    error: dict[str, Any] = json.loads(output)["error"]
    return error


def test_a_taken_port_is_named(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = refused(
            serve(home, "--metrics-port", "0", "--health-port", "0", "--no-gateway", "--grpc-port", str(port)), 6
        )
    assert error["code"] == "unavailable"
    assert error["fields"]["port"] == port
    assert "--grpc-port" in error["message"]


def test_a_missing_triton_says_what_to_do(home: Path, tmp_path: Path) -> None:
    error = refused(serve(home, *FREE_PORTS, SCUMBLE_TRITON=str(tmp_path / "nothing")), 6)
    assert "SCUMBLE_TRITON" in error["message"]


@pytest.mark.parametrize(
    ("base", "status", "code"), [("no/base", 3, "not_found"), ("l/a", 4, "refused"), ("a b", 2, "invalid_request")]
)
def test_a_base_that_cannot_be_served_ends_it(home: Path, base: str, status: int, code: str) -> None:
    assert refused(serve(home, *FREE_PORTS, base=base), status)["code"] == code


def test_a_missing_registry_ends_it(tmp_path: Path) -> None:
    assert refused(serve(tmp_path, *FREE_PORTS), 3)["code"] == "not_found"
