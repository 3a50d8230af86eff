"""Starts tritonserver, sees that its models really answer, restarts it when they do not, and stops it."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scumble.errors import ScumbleError, Unavailable
from scumble_server.triton.probe import ask_stats
from scumble_server.triton.processes import is_running, kill_group
from scumble_server.triton.run_folder import RunFolder

DRAIN_TIMEOUT = 20.0
"""Seconds for the running step and the answers on their way, when the server stops."""
EXIT_GRACE = 1.0
LOOK_INTERVAL = 0.25
ASK_INTERVAL = 2.0
FIRST_ANSWER_TIMEOUT = 5.0
ASK_TIMEOUT = 20.0
MAX_SILENCE = 60.0
"""Seconds without an answer from the model after which the server counts as stuck."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
STEADY_AFTER = 60.0
"""Seconds of health after which earlier failures are forgotten."""
MAX_FAILURES = 6

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Launch:
    """What is started, again and again if need be, and where its models are asked."""

    command: list[str]
    environment: dict[str, str]
    run: RunFolder
    host: str
    http_port: int
    timeout: float
    """Seconds until it must be ready."""


class Supervisor:
    """Owns one tritonserver and the thread that watches it. `start` once; `stop` and `wait` from any thread.

    The server has a session of its own, so a Ctrl-C in the terminal reaches us alone and the end is ours
    to arrange. After `stop` no process of the server is left.
    """

    def __init__(self, launch: Launch) -> None:
        self.restarts = 0
        self._launch = launch
        self._log = launch.run.log
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._last_error: ScumbleError | None = None
        self._failure: ScumbleError | None = None
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        """Return once the models answer. Raises what kept them from starting; nothing is left then."""
        try:
            self._launch_once()
        except BaseException:
            self._kill()
            raise
        self._watcher.start()

    def wait(self, timeout: float | None = None) -> None:
        """Return when the server was stopped. Raises Unavailable when it cannot be kept alive."""
        self._watcher.join(timeout)
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """End in order: what waits is answered with Unavailable, the running step is finished."""
        self._stopping.set()
        try:
            if self._watcher.is_alive():
                self._watcher.join()
            if self._process and self._process.poll() is None:
                self._launch.run.ask_to_stop()
                self._wait_for(self._launch.run.is_drained, DRAIN_TIMEOUT)
                self._process.send_signal(signal.SIGTERM)
                # Idle connections of clients keep tritonserver for its whole exit timeout; nobody is served any more.
                self._wait_for(lambda: False, EXIT_GRACE)
        finally:
            self._kill()

    def _wait_for(self, condition: Callable[[], bool], timeout: float) -> None:
        """Return when `condition` holds, the server has ended, or the time is over."""
        deadline = time.monotonic() + timeout
        while self._process and self._process.poll() is None and not condition() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _launch_once(self) -> None:
        launch = self._launch
        launch.run.forget_stubs()
        # A Ctrl-C reaches the main thread alone: it may come at any moment, and would lose a process just started.
        with ThreadPoolExecutor(1) as uninterrupted:
            uninterrupted.submit(self._open).result()
        deadline = time.monotonic() + launch.timeout
        while not self._answers(FIRST_ANSWER_TIMEOUT):
            self._raise_if_ended()
            if time.monotonic() > deadline:
                raise Unavailable(f"the server was not ready after {launch.timeout:g} s; see {self._log}")
            if self._stopping.wait(LOOK_INTERVAL):
                raise Unavailable("the server was stopped while it started")

    def _open(self) -> None:
        launch = self._launch
        with launch.run.log.open("ab") as output:
            self._process = subprocess.Popen(
                launch.command,
                env=launch.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _raise_if_ended(self) -> None:
        assert self._process
        status = self._process.poll()
        if status is not None:
            raise self._launch.run.take_failure() or Unavailable(
                f"tritonserver ended with status {status} before it was ready; "
                f"the end of {self._log}:\n{_tail(self._log)}",
                log=str(self._log),
            )

    def _answers(self, timeout: float) -> bool:
        try:
            return ask_stats(self._launch.host, self._launch.http_port, timeout).alive
        except Unavailable:
            return False

    def _watch(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            self._until_unwell()
            if self._stopping.is_set():
                return
            self._kill()
            failures = 1 if time.monotonic() - began > STEADY_AFTER else failures + 1
            if failures > MAX_FAILURES:
                self._failure = self._last_error or Unavailable(f"the server dies again and again; see {self._log}")
                return
            log.warning("the server died and is started again; see %s", self._log)
            if not self._stopping.wait(min(FIRST_PAUSE * 2**failures, LONGEST_PAUSE)):
                self._launch_again()

    def _launch_again(self) -> None:
        try:
            self._launch_once()
        except ScumbleError as error:
            self._last_error = Unavailable(f"the server died and does not come back: {error.message}")
            self._kill()
        else:
            self._last_error = None
            self.restarts += 1

    def _until_unwell(self) -> None:
        """Return when a process has died, the model is silent for too long, or the server shall stop."""
        assert self._process
        answered = asked = time.monotonic()
        while not self._stopping.wait(LOOK_INTERVAL):
            if self._process.poll() is not None or not all(map(is_running, self._launch.run.stubs())):
                return
            now = time.monotonic()
            if now - asked >= ASK_INTERVAL:
                asked = now
                if self._answers(ASK_TIMEOUT):
                    answered = time.monotonic()
                elif time.monotonic() - answered > MAX_SILENCE:
                    return

    def _kill(self) -> None:
        """Leave no process of the server and none of its shared memory."""
        if self._process:
            kill_group(self._process.pid)
            self._process.wait()
            self._launch.run.remove_shared_memory()


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
