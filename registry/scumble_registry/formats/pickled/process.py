"""The parent process: it starts one reader per file and reads only a JSON document and a safetensors file from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from scumble.errors import Refused, Unavailable
from scumble_registry.formats.pickled.tree import Plain, decode

_MEMORY = 384 << 20
"""Bytes of address space of the reader beside the file that it maps; Python and numpy take half of it."""
_SECONDS, _BYTES_PER_SECOND = 20, 20 << 20  # a slow disk
_MAX_ANSWER = 128 << 20

_BOOTSTRAP = """
import sys, types
for name, folder in zip(("scumble_registry", "scumble_registry.formats"), sys.argv[1:3]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from scumble_registry.formats.pickled.child import main
main(*map(int, sys.argv[3:]))
"""
"""Registers the two packages as empty modules, so that the reader imports nothing else of the registry."""


def to_safetensors(file: Path, target: Path, max_bytes: int) -> Plain:
    """Write the tensors of the pickled `file` to the new file `target`, named by their path; return the other values.

    Raises Refused, naming the problem, for a file that is no pickle of plain weights or is larger than `max_bytes`;
    Unavailable if the disk is full. After an error there is no `target`.
    """
    if file.stat().st_size > max_bytes:
        raise Refused(f"{file.name} is larger than {max_bytes} bytes; --max-size raises the limit", file=file.name)
    try:
        with file.open("rb") as source, target.open("xb") as out:
            values = _run_reader(file.name, source.fileno(), out.fileno(), file.stat().st_size, max_bytes)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return values


def _run_reader(name: str, source: int, target: int, size: int, max_bytes: int) -> Plain:
    seconds = _SECONDS + size // _BYTES_PER_SECOND
    formats = Path(__file__).parent.parent
    command = [sys.executable, "-I", "-c", _BOOTSTRAP, str(formats.parent), str(formats)]
    command += map(str, (source, target, _MEMORY, seconds, max_bytes))
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=(source, target),
            env=environment,
            timeout=3 * seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _refusal(name, f"more to read than {3 * seconds} seconds are enough for") from error
    try:
        answer = json.loads(done.stdout) if done.returncode == 0 and len(done.stdout) < _MAX_ANSWER else {}
        match answer:
            case {"tree": tree}:
                return decode(tree)
            case {"unsound": str(why)}:
                raise _refusal(name, why)
            case {"failed": str(why)}:
                raise Unavailable(f"cannot convert {name}: {why}; check space and permissions")
    except (ValueError, RecursionError):
        pass
    raise _refusal(name, f"something that ended its reader (exit status {done.returncode})")


def _refusal(name: str, why: str) -> Refused:
    return Refused(
        f"{name} is a pickle, of which nothing was executed, and has {why}. Use a safetensors file of these "
        "weights, or make one from a file that you trust: torch.load(…, weights_only=True), then "
        "safetensors.torch.save_file",
        file=name,
    )
