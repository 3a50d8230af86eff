"""A server for the duration of a `with` block: for tests, the demo, `scumble generate` and `scumble serve`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scumble.addresses import is_loopback
from scumble.errors import Refused
from scumble_registry import Registry
from scumble_server.config import ServerConfig
from scumble_server.triton.binaries import TritonInstall, find_triton
from scumble_server.triton.health import HealthServer
from scumble_server.triton.launcher import Ports, claim_ports, command, default_model_repository, environment, patience
from scumble_server.triton.probe import reachable
from scumble_server.triton.run_folder import OwnedRun
from scumble_server.triton.supervisor import Launch, Supervisor

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server's addresses and its supervisor."""

    host: str
    ports: Ports
    log: Path
    supervisor: Supervisor

    @property
    def grpc_url(self) -> str:
        """`host:port`, as `scumble.Client` and tritonclient take it."""
        return f"{self._address}:{self.ports.grpc}"

    @property
    def http_url(self) -> str | None:
        """Triton's own HTTP, if it is on."""
        return None if self.ports.http is None else f"http://{self._address}:{self.ports.http}"

    @property
    def health_url(self) -> str:
        """Where `/healthz` and `/readyz` are."""
        return f"http://{self._address}:{self.ports.health}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._address}:{self.ports.metrics}/metrics"

    @property
    def _address(self) -> str:
        return reachable(self.host)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the server is stopped, `timeout` seconds at most."""
        self.supervisor.wait(timeout)


@contextmanager
def running_server(
    config: ServerConfig,
    *,
    host: str = LOOPBACK,
    ports: Ports = Ports(),  # noqa: B008 - frozen
    triton: Path | None = None,
    models: Path | None = None,
    start_timeout: float | None = None,
    expose_vulnerable_triton: bool = False,
) -> Iterator[RunningServer]:
    """Start a server, wait until it responds, and stop it at the end of the `with` block, also after an error.

    `start_timeout` in seconds; None: what such a server may need. Leaves no process and no shared memory behind.
    Raises Unavailable if Triton is missing or a port is taken, Refused if it is too old for `host`, and NotFound
    without registry or base, before anything is started; then any error of loading the base.
    """
    install = find_triton(triton)
    if not expose_vulnerable_triton:
        check_exposure(install, host)
    with Registry.open(config.home) as registry:
        for ref in (config.base, *config.more_bases):
            registry.resolve(ref)
    claimed = claim_ports(host, ports)
    repository = models or default_model_repository()
    run = OwnedRun(config.home)
    try:
        timeout = patience(config) if start_timeout is None else start_timeout
        arguments = command(install, run.folder, config, repository, host, claimed, timeout)
        variables = environment(install, run.folder, config)
        supervisor = Supervisor(Launch(arguments, variables, run.folder, host, claimed.grpc, timeout))
        health = HealthServer(host, claimed.health, supervisor.why_not_ready)
        try:
            supervisor.start()
            yield RunningServer(host, claimed, run.folder.log, supervisor)
        finally:
            supervisor.stop()
            health.close()
    finally:
        run.close()


def check_exposure(install: TritonInstall, host: str) -> None:
    """Raises Refused where networks would reach a Triton with open holes."""
    if install.faces_networks or is_loopback(host):
        return
    version = "of unknown version" if install.version is None else ".".join(map(str, install.version))
    raise Refused(
        f"tritonserver {version} at {install.server} has published holes, so it does not listen on {host}: one request "
        "can end it, or run code. Use NVIDIA's container 26.07 or newer, or listen on 127.0.0.1 behind a gateway; "
        "--expose-vulnerable-triton listens all the same (see SECURITY.md)",
        host=host,
    )
