"""Finds tritonserver: in NVIDIA's container in production, in the nvidia-pytriton wheel on a laptop and in CI."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scumble.errors import Unavailable

TRITON_KEY = "SCUMBLE_TRITON"
CONTAINER = Path("/opt/tritonserver")
WHEEL = "nvidia-pytriton==0.7.0"
FIRST_SAFE = (2, 71)
"""Triton of container 26.07. Older ones end at one hostile request, or worse: see SECURITY.md."""
VERSION_KEY = "TRITON_SERVER_VERSION"
"""Set in NVIDIA's container."""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True, slots=True)
class TritonInstall:
    """The files of a Triton installation whose Python stub has the running interpreter's version."""

    server: Path
    backend: Path
    """Folder of `libtriton_python.so` and `triton_python_backend_utils.py`."""
    stub: Path
    """`triton_python_backend_stub` linked with this Python."""
    caches: Path | None
    libraries: tuple[Path, ...]
    """Folders for LD_LIBRARY_PATH."""
    version: tuple[int, ...] | None = None
    """Triton's own version, e.g. (2, 71, 0); None where it does not say, as in the wheel."""

    @property
    def faces_networks(self) -> bool:
        """Whether no published hole of its parsers is open, so that strangers may send it anything."""
        return self.version is not None and self.version >= FIRST_SAFE


def find_triton(explicit: Path | None = None) -> TritonInstall:
    """Take `explicit`, else SCUMBLE_TRITON, else the container's, else the wheel's.

    A path is the binary, or the folder with `bin/tritonserver`. If the named one does not exist, nothing else is tried.
    Raises Unavailable, with what to install.
    """
    named = explicit or (Path(os.environ[TRITON_KEY]) if os.environ.get(TRITON_KEY) else None)
    if named is not None:
        return _install_at(_root_of(named.expanduser().absolute()))
    for root in _usual_roots():
        if _server(root).is_file():
            return _install_at(root)
    raise Unavailable(
        f"no tritonserver was found: run `{sys.executable} -m pip install --no-deps {WHEEL}` "
        f"(Linux x86-64, glibc 2.35 or newer), run in NVIDIA's Triton container, "
        f"or point {TRITON_KEY} at a tritonserver"
    )


def _root_of(path: Path) -> Path:
    return path.parent.parent if path.is_file() else path


def _usual_roots() -> Iterator[Path]:
    yield CONTAINER
    wheel = importlib.util.find_spec("pytriton")
    for folder in wheel.submodule_search_locations or () if wheel else ():
        yield Path(folder) / "tritonserver"


def _server(root: Path) -> Path:
    return root / "bin" / "tritonserver"


def _install_at(root: Path) -> TritonInstall:
    server = _server(root)
    if not server.is_file():
        raise Unavailable(
            f"no tritonserver at {server}; set {TRITON_KEY} to the binary or to the folder that has bin/tritonserver",
            path=str(server),
        )
    backend = root / "backends" / "python"
    caches = root / "caches"
    return TritonInstall(
        server=server,
        backend=_present(backend / "libtriton_python.so").parent,
        stub=_matching_stub(root, backend),
        caches=caches if caches.is_dir() else None,
        libraries=tuple(
            folder for folder in (root.parent.parent / "nvidia_pytriton.libs", root / "lib") if folder.is_dir()
        ),
        version=_version(root),
    )


def _version(root: Path) -> tuple[int, ...] | None:
    """Read the version that NVIDIA's image notes beside the binary, or in its environment for its own copy."""
    noted = root / "TRITON_VERSION"
    text = noted.read_text() if noted.is_file() else os.environ.get(VERSION_KEY, "") if root == CONTAINER else ""
    numbers = re.match(r"\d+(\.\d+)+", text.strip())
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else None


def _present(path: Path) -> Path:
    if not path.is_file():
        raise Unavailable(f"this Triton has no Python backend: {path} is missing", path=str(path))
    return path


def _matching_stub(root: Path, backend: Path) -> Path:
    """Return the stub for this Python. The wheel has one for each version, the container only for its own Python."""
    name = "triton_python_backend_stub"
    stubs = root / "python_backend_stubs"
    stub = _present(stubs / PYTHON / name if stubs.is_dir() else backend / name)
    if f"libpython{PYTHON}".encode() not in stub.read_bytes():
        raise Unavailable(
            f"{stub} is built for another Python than {PYTHON}, which runs this; use that Python, or install {WHEEL}",
            path=str(stub),
        )
    return stub
