"""Ports are claimed before anything starts; the key to Triton's own controls is given to nobody."""

from __future__ import annotations

import os
import socket
import sys
from http.client import HTTPConnection
from pathlib import Path

import pytest
from grpc import RpcError, insecure_channel

from scumble.errors import Unavailable
from scumble_server.config import ServerConfig
from scumble_server.triton.binaries import TritonInstall
from scumble_server.triton.launcher import (
    BUILD_TIMEOUT,
    COMPILE_TIMEOUT,
    START_TIMEOUT,
    Ports,
    claim_ports,
    command,
    environment,
    patience,
)
from scumble_server.triton.run_folder import OwnedRun

HOST = "127.0.0.1"


def test_zero_takes_a_free_port_for_each() -> None:
    ports = claim_ports(HOST, Ports(http=0))
    assert len({ports.http, ports.grpc, ports.metrics, ports.health}) == 4
    assert claim_ports(HOST, ports) == ports


@pytest.mark.parametrize("purpose", ["http", "grpc", "metrics", "health"])
def test_a_taken_port_is_named(purpose: str) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"{purpose} port {port} .* is taken") as caught:
            claim_ports(HOST, Ports(**{purpose: port}))
    assert caught.value.fields["port"] == port


def test_an_address_that_is_not_ours_is_named() -> None:
    with pytest.raises(Unavailable, match=r"192\.0\.2\.1"):
        claim_ports("192.0.2.1", Ports())


@pytest.fixture
def install(tmp_path: Path) -> TritonInstall:
    backend = tmp_path / "python"
    backend.mkdir()
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (backend / name).touch()
    stub = tmp_path / "triton_python_backend_stub"
    stub.touch()
    return TritonInstall(tmp_path / "tritonserver", backend, stub, None, (tmp_path / "libs",))


def test_the_command_closes_what_would_run_code(install: TritonInstall, tmp_path: Path) -> None:
    folder = OwnedRun(tmp_path).folder
    config = ServerConfig(home=tmp_path, base="tiny/base")
    arguments = command(install, folder, config, tmp_path, HOST, Ports(2, 3, 4, http=1))
    assert "--model-control-mode=none" in arguments
    for option in ("--http-restricted-api", "--grpc-restricted-protocol"):
        (closed,) = (argument for argument in arguments if argument.startswith(option))
        assert "model-repository" in closed
    assert f"--backend-config=python,shm-region-prefix-name={folder.shm_prefix}" in arguments
    assert {link.name for link in (folder.path / "backends" / "python").iterdir()} == {
        "libtriton_python.so",
        "triton_python_backend_utils.py",
        "triton_python_backend_stub",
    }


def test_tritons_http_is_off_unless_asked_for(install: TritonInstall, tmp_path: Path) -> None:
    config = ServerConfig(home=tmp_path, base="tiny/base")
    arguments = command(install, OwnedRun(tmp_path).folder, config, tmp_path, HOST, claim_ports(HOST, Ports()))
    assert "--allow-http=false" in arguments
    assert not [argument for argument in arguments if argument.startswith("--http")]


def test_what_opens_the_closed_apis_cannot_be_sent(install: TritonInstall, tmp_path: Path) -> None:
    """Others on this machine can read the command line."""
    config = ServerConfig(home=tmp_path, base="tiny/base")
    arguments = command(install, OwnedRun(tmp_path).folder, config, tmp_path, HOST, Ports(2, 3, 4, http=1))
    for option in ("--http-restricted-api", "--grpc-restricted-protocol"):
        (closed,) = (argument for argument in arguments if argument.startswith(option))
        name, _, value = closed.partition(":")[2].partition("=")
        http = HTTPConnection(HOST)
        http.putrequest("POST", "/v2/logging")
        with pytest.raises(ValueError, match="Invalid header value"):
            http.putheader(name, value)
        with insecure_channel(f"{HOST}:1") as channel, pytest.raises(RpcError, match="Invalid metadata"):
            channel.unary_unary("/x/y")(b"", metadata=[(name, value)])


def test_the_stub_finds_this_python(install: TritonInstall, tmp_path: Path) -> None:
    config = ServerConfig(home=tmp_path, base="tiny/base")
    variables = environment(install, OwnedRun(tmp_path).folder, config)
    assert variables["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert str(tmp_path / "libs") in variables["LD_LIBRARY_PATH"].split(os.pathsep)[1:]
    assert variables["CUDA_VISIBLE_DEVICES"] == ""


def test_a_server_that_builds_engines_or_compiles_has_the_time_that_it_needs(
    install: TritonInstall, tmp_path: Path
) -> None:
    plain = ServerConfig(home=tmp_path, base="tiny/base")
    builds = plain.model_copy(update={"build_engines": True})
    assert patience(plain) == START_TIMEOUT
    assert patience(builds) == BUILD_TIMEOUT
    assert patience(plain.model_copy(update={"compile_steps": True})) == COMPILE_TIMEOUT
    arguments = command(install, OwnedRun(tmp_path).folder, builds, tmp_path, HOST, Ports(2, 3, 4), patience(builds))
    assert f"--backend-config=python,stub-timeout-seconds={BUILD_TIMEOUT:.0f}" in arguments
