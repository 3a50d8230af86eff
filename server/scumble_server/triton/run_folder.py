"""The files of one running server: a folder with a lock, a log, and a prefix in /dev/shm.

        SCUMBLE_HOME/run/<name>/lock               held (flock) by the supervisor until it ends
                                backends/python/   the Python backend with the stub for this Python
                                failure.json       the error that kept the models from starting, ScumbleError.to_dict()
                                <pid>.stub         one for each model's process
                                heartbeat          when the loop last said that it runs, see heartbeat_file
                                stop, drained      the supervisor wants to stop; every request has its response
        SCUMBLE_HOME/logs/<name>.log               output of tritonserver and the models
        /dev/shm/<name>…                           Triton's shared memory

A lock ends with its process, however that ends, and works across PID namespaces. So a process that can take the lock of
a folder knows that its supervisor is gone: the next start removes the folder, and orphaned stubs end.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from scumble.errors import ScumbleError, Unavailable, from_dict
from scumble.files import private_folder

RUN_KEY = "SCUMBLE_RUN"
PREFIX = "scumble_"
SHM = Path("/dev/shm")  # noqa: S108 - Triton's choice
KEPT_LOGS = 20


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    @classmethod
    def from_env(cls) -> RunFolder:
        return cls(Path(os.environ[RUN_KEY]))

    def to_env(self) -> dict[str, str]:
        return {RUN_KEY: str(self.path)}

    @property
    def shm_prefix(self) -> str:
        return self.path.name

    @property
    def log(self) -> Path:
        return self.path.parent.parent / "logs" / f"{self.path.name}.log"

    def owner_is_gone(self) -> bool:
        """Return whether the supervisor has ended. Never blocks."""
        try:
            with (self.path / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            return True
        return True

    def note_stub(self) -> None:
        """Register this process as a stub."""
        (self.path / f"{os.getpid()}.stub").touch()

    def stubs(self) -> list[int]:
        return [int(note.stem) for note in self.path.glob("*.stub")]

    def forget_stubs(self) -> None:
        for note in self.path.glob("*.stub"):
            note.unlink()

    def ask_to_stop(self) -> None:
        (self.path / "stop").touch()

    def is_stopping(self) -> bool:
        return (self.path / "stop").exists()

    def say_drained(self) -> None:
        (self.path / "drained").touch()

    def is_drained(self) -> bool:
        return (self.path / "drained").exists()

    def write_failure(self, error: ScumbleError) -> None:
        (self.path / "failure.json").write_text(json.dumps(error.to_dict(), default=str))

    def take_failure(self) -> ScumbleError | None:
        """Return and remove the error that `write_failure` wrote, if any."""
        path = self.path / "failure.json"
        try:
            error = from_dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        path.unlink()
        return error

    def hide_shared_memory(self) -> None:
        """Take it from other users: Triton makes it readable by all, whatever the umask."""
        for region in SHM.glob(f"{self.shm_prefix}*"):
            region.chmod(0o600)

    def remove_shared_memory(self) -> None:
        for region in SHM.glob(f"{self.shm_prefix}*"):
            region.unlink(missing_ok=True)


class OwnedRun:
    """Owns a new run folder and its lock; `close` removes everything except the log."""

    def __init__(self, home: Path) -> None:
        sweep(home)
        self.folder = RunFolder(home / "run" / f"{PREFIX}{secrets.token_hex(4)}")
        try:
            private_folder(self.folder.path)
            private_folder(self.folder.log.parent)
            self._lock = (self.folder.path / "lock").open("w")
        except OSError as error:
            raise Unavailable(
                f"cannot write to {home} ({error.strerror}); set SCUMBLE_HOME to a writable folder"
            ) from error
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        self.folder.remove_shared_memory()
        shutil.rmtree(self.folder.path, ignore_errors=True)
        self._lock.close()


def sweep(home: Path) -> None:
    """Remove the files of this home's servers that were killed, and all but the newest logs."""
    for path in (home / "run").glob(f"{PREFIX}*"):
        run = RunFolder(path)
        if _is_settled(path) and run.owner_is_gone():
            run.remove_shared_memory()
            shutil.rmtree(path, ignore_errors=True)
    logs = sorted((home / "logs").glob(f"{PREFIX}*.log"), key=_modified, reverse=True)
    for log in logs[KEPT_LOGS:]:
        log.unlink(missing_ok=True)


def _is_settled(path: Path) -> bool:
    """Return whether a folder is older than 5 s; a newer one may belong to a server that is about to lock it."""
    return time.time() - _modified(path) > 5


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
