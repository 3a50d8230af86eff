"""Builds tritonserver's command line, environment and backend folder."""

from __future__ import annotations

import os
import sys
import sysconfig
from contextlib import ExitStack
from dataclasses import dataclass, fields
from math import ceil
from pathlib import Path

from scumble.addresses import bind
from scumble.errors import Unavailable
from scumble_server.config import ServerConfig
from scumble_server.triton.binaries import TritonInstall
from scumble_server.triton.parameters import GRPC_FORWARDS, HTTP_FORWARDS
from scumble_server.triton.run_folder import RunFolder

EXIT_TIMEOUT = 10
"""Seconds until tritonserver exits although clients hold connections; the supervisor kills it sooner."""
START_TIMEOUT, COMPILE_TIMEOUT, BUILD_TIMEOUT = 600.0, 7200.0, 86400.0
"""Seconds in which a server must be ready: a base on a slow disk takes minutes, engines that are built first hours."""
SHM_BYTES = 4 * 1024 * 1024
CLOSED_APIS = "model-repository,shared-memory,trace,logging"
"""APIs that are closed: loading a model runs its code, a trace writes files."""
CLOSED_BY = "\x01closed=\x01\n\x01"
"""The header and the value that would open them. Others on this machine can read them in the command line, and no HTTP
header can carry them.
"""


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports; 0 means any free one, None that nothing listens."""

    grpc: int = 0
    metrics: int = 0
    health: int = 0
    http: int | None = None
    """Triton's own HTTP."""


def claim_ports(host: str, ports: Ports) -> Ports:
    """Replace zeros by free ports. Raises Unavailable naming the first port that is taken."""
    wanted = {field.name: getattr(ports, field.name) for field in fields(ports)}
    with ExitStack() as sockets:
        bound = {
            name: sockets.enter_context(bind(host, name, port)) for name, port in wanted.items() if port is not None
        }
        return Ports(**{name: each.getsockname()[1] for name, each in bound.items()})


def default_model_repository() -> Path:
    """Return the model repository: beside the code in a wheel, at the repository's root in an editable install."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "model_repository", package.parents[1] / "model_repository"):
        if folder.is_dir():
            return folder
    raise Unavailable(f"the Triton models are missing from this installation ({package})")


def assemble_backend(install: TritonInstall, run: RunFolder) -> Path:
    """Link the backend's files and the stub for this Python into the run folder; return the folder of backends."""
    folder = run.path / "backends" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    for source in (*install.backend.glob("*.so"), *install.backend.glob("*.py"), install.stub):
        link = folder / source.name
        link.unlink(missing_ok=True)
        link.symlink_to(source)
    return folder.parent


def patience(config: ServerConfig) -> float:
    """Return the seconds in which a server of this configuration must be ready."""
    if config.build_engines:
        return BUILD_TIMEOUT
    return COMPILE_TIMEOUT if config.compile_steps else START_TIMEOUT


def command(
    install: TritonInstall,
    run: RunFolder,
    config: ServerConfig,
    models: Path,
    host: str,
    ports: Ports,
    timeout: float = START_TIMEOUT,
) -> list[str]:
    """Return the command line of tritonserver, whose models may take `timeout` seconds to load."""
    key = f"{CLOSED_APIS}:{CLOSED_BY}"
    return [
        str(install.server),
        f"--model-repository={models}",
        "--model-control-mode=none",
        f"--grpc-restricted-protocol={key}",
        f"--grpc-header-forward-pattern={GRPC_FORWARDS}",
        f"--backend-directory={assemble_backend(install, run)}",
        *([f"--cache-directory={install.caches}"] if install.caches else []),
        f"--backend-config=python,shm-region-prefix-name={run.shm_prefix}",
        f"--backend-config=python,shm-default-byte-size={SHM_BYTES}",
        f"--backend-config=python,shm-growth-byte-size={SHM_BYTES}",
        f"--backend-config=python,stub-timeout-seconds={ceil(timeout)}",
        f"--exit-timeout-secs={EXIT_TIMEOUT}",
        *_http(host, ports.http, key),
        f"--grpc-address={host}",
        f"--metrics-address={host}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
        # Our own code moves tensors to the GPU; Triton's copies need no pinned memory.
        "--pinned-memory-pool-byte-size=0",
        *(["--allow-gpu-metrics=false"] if config.device == "cpu" else []),
        "--disable-auto-complete-config",
    ]


def _http(host: str, port: int | None, key: str) -> list[str]:
    if port is None:
        return ["--allow-http=false"]
    return [
        f"--http-address={host}",
        f"--http-port={port}",
        f"--http-restricted-api={key}",
        f"--http-header-forward-pattern={HTTP_FORWARDS}",
    ]


def environment(install: TritonInstall, run: RunFolder, config: ServerConfig) -> dict[str, str]:
    """Return tritonserver's environment. The stub ignores PYTHONPATH: it finds the virtual environment by PATH, and
    libpython by LD_LIBRARY_PATH.
    """
    libraries = [sysconfig.get_config_var("LIBDIR"), *install.libraries, os.environ.get("LD_LIBRARY_PATH")]
    return {
        **os.environ,
        **config.to_env(),
        **run.to_env(),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "LD_LIBRARY_PATH": os.pathsep.join(str(folder) for folder in libraries if folder),
        **({"CUDA_VISIBLE_DEVICES": ""} if config.device == "cpu" else {}),
    }
