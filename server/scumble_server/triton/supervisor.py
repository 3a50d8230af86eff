"""Starts tritonserver, checks that its models respond, restarts it if they do not, and stops it."""

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
"""Seconds for the running step and pending responses when the server stops."""
EXIT_GRACE = 1.0
LOOK_INTERVAL = 0.25
ASK_INTERVAL = 2.0
FIRST_ANSWER_TIMEOUT = 5.0
ASK_TIMEOUT = 20.0
MAX_SILENCE = 60.0
"""Seconds without a response from the model after which the server counts as stuck."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
STEADY_AFTER = 60.0
"""Seconds without a failure after which earlier failures no longer count."""
MAX_FAILURES = 6

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start the server, and the address where its models are queried."""

    command: list[str]
    environment: dict[str, str]
    run: RunFolder
    host: str
    http_port: int
    timeout: float
    """Seconds that it may take to get ready."""


class Supervisor:
    """Owns one tritonserver and the thread that watches it. `start` once; `stop` and `wait` from any thread.

    The server has its own session, so a Ctrl-C in the terminal reaches only this process, which then stops the server
    in order. After `stop` no process of the server is left.
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
        """Start the server and wait until its models respond. If they cannot start, raises the reason and leaves
        nothing.
        """
        try:
            self._launch_once()
        except BaseException:
            self._kill()
            raise
        self._watcher.start()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the server is stopped. Raises Unavailable if it cannot be kept running."""
        self._watcher.join(timeout)
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Stop in order: queued requests get Unavailable, the running step is finished."""
        self._stopping.set()
        try:
            if self._watcher.is_alive():
                self._watcher.join()
            if self._process and self._process.poll() is None:
                self._launch.run.ask_to_stop()
                self._wait_for(self._launch.run.is_drained, DRAIN_TIMEOUT)
                self._process.send_signal(signal.SIGTERM)
                # Idle client connections would keep tritonserver for its whole exit timeout, although it serves
                # nothing.
                self._wait_for(lambda: False, EXIT_GRACE)
        finally:
            self._kill()

    def _wait_for(self, condition: Callable[[], bool], timeout: float) -> None:
        """Wait until `condition` holds or the server has ended, `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        while self._process and self._process.poll() is None and not condition() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _launch_once(self) -> None:
        launch = self._launch
        launch.run.forget_stubs()
        # A Ctrl-C raises in the main thread at any moment, and would lose track of a process just started.
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
            self._wait_until_unhealthy()
            if self._stopping.is_set():
                return
            self._kill()
            failures = 1 if time.monotonic() - began > STEADY_AFTER else failures + 1
            if failures > MAX_FAILURES:
                self._failure = self._last_error or Unavailable(f"the server died repeatedly; see {self._log}")
                return
            log.warning("the server died and is restarted; see %s", self._log)
            if not self._stopping.wait(min(FIRST_PAUSE * 2**failures, LONGEST_PAUSE)):
                self._launch_again()

    def _launch_again(self) -> None:
        try:
            self._launch_once()
        except ScumbleError as error:
            self._last_error = Unavailable(f"the server died and could not be restarted: {error.message}")
            self._kill()
        else:
            self._last_error = None
            self.restarts += 1

    def _wait_until_unhealthy(self) -> None:
        """Return when a process has died, the model has not responded for too long, or the server is to stop."""
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
        """Kill all processes of the server and remove its shared memory."""
        if self._process:
            kill_group(self._process.pid)
            self._process.wait()
            self._launch.run.remove_shared_memory()


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
