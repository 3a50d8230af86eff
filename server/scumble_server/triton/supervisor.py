"""Starts tritonserver, checks that its models respond, restarts it if they do not, and stops it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from scumble.connection import Connection
from scumble.errors import ScumbleError, Unavailable
from scumble_server.triton.heartbeat_file import HeartbeatFile
from scumble_server.triton.probe import Probe, answers, reachable
from scumble_server.triton.processes import is_running, kill_group
from scumble_server.triton.run_folder import RunFolder

PRIVATE = 0o077
"""The server's umask: its logs may hold prompts."""
DRAIN_TIMEOUT = 20.0
"""Seconds for the running step and pending responses when the server stops."""
EXIT_GRACE = 1.0
LOOK_INTERVAL = 0.25
FIRST_ANSWER_TIMEOUT = 5.0
READY_SILENCE = 2.5
"""Seconds without a response from the model after which the server is not ready."""
MAX_SILENCE = 60.0
"""Seconds without a response from the model after which the server counts as stuck."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
STEADY_AFTER = 600.0
"""Seconds for which failures count: each of these doubles the pause before the next start."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start the server, and the address where its models are queried, by gRPC."""

    command: list[str]
    environment: dict[str, str]
    run: RunFolder
    host: str
    grpc_port: int
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
        self._heartbeat = HeartbeatFile(launch.run.path)
        self._probe: Probe | None = None
        self._failures: list[float] = []
        self._last_error: ScumbleError | None = None
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
        """Wait until the server is stopped, `timeout` seconds at most."""
        self._watcher.join(timeout)

    def why_not_ready(self) -> str | None:
        """Return why no step would run now; None if one would."""
        probe, process = self._probe, self._process
        if self._stopping.is_set():
            return "the server is stopping"
        if probe is None or process is None:
            return self._last_error.message if self._last_error else "the server is starting"
        if self._died(process):
            return "a process of the server has ended; it will be started again"
        if not self._heartbeat.is_fresh:
            return f"the loop has not been heard of for {self._heartbeat.age():.1f} s"
        if probe.silence() > READY_SILENCE:
            return f"the server has not answered for {probe.silence():.1f} s"
        return None

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
        self._heartbeat.forget()
        # A Ctrl-C raises in the main thread at any moment, and would lose track of a process just started.
        with ThreadPoolExecutor(1) as uninterrupted:
            uninterrupted.submit(self._open).result()
        self._wait_for_answer()
        launch.run.hide_shared_memory()
        self._probe = Probe(launch.host, launch.grpc_port)

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + self._launch.timeout
        with closing(Connection(f"{reachable(self._launch.host)}:{self._launch.grpc_port}")) as connection:
            while not (self._heartbeat.is_fresh and answers(connection, FIRST_ANSWER_TIMEOUT)):
                self._raise_if_ended()
                if time.monotonic() > deadline:
                    raise Unavailable(f"the server was not ready after {self._launch.timeout:g} s; see {self._log}")
                if self._stopping.wait(LOOK_INTERVAL):
                    raise Unavailable("the server was stopped while it started")

    def _open(self) -> None:
        launch = self._launch
        with os.fdopen(os.open(launch.run.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)) as output:
            self._process = subprocess.Popen(
                launch.command,
                env=launch.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                umask=PRIVATE,
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

    def _watch(self) -> None:
        """Start the server again whenever it fails, after pauses that grow while failures are frequent."""
        while not self._stopping.is_set():
            reason = self._wait_until_unhealthy()
            if self._stopping.is_set():
                return
            self._kill()
            pause = self._next_pause()
            log.warning("%s: the server is started again in %g s; see %s", reason, pause, self._log)
            if not self._stopping.wait(pause):
                self._launch_again()

    def _next_pause(self) -> float:
        """Seconds before the next start: twice as long for each failure of the last ten minutes."""
        now = time.monotonic()
        self._failures = [*(at for at in self._failures if now - at < STEADY_AFTER), now][-16:]
        return min(FIRST_PAUSE * 2.0 ** (len(self._failures) - 1), LONGEST_PAUSE)

    def _launch_again(self) -> None:
        try:
            self._launch_once()
        except ScumbleError as error:
            self._last_error = Unavailable(f"the server died and could not be restarted: {error.message}")
            log.warning("%s", self._last_error.message)
            self._kill()
        else:
            self._last_error = None
            self.restarts += 1

    def _wait_until_unhealthy(self) -> str:
        """Return why the server must be started again, as soon as it must; or when it is to stop."""
        probe, process = self._probe, self._process
        if probe is None or process is None:
            return "the last start failed"
        while not self._stopping.wait(LOOK_INTERVAL):
            if self._died(process):
                return "a process of the server has ended"
            if self._heartbeat.is_lost:
                return f"the loop has not been heard of for {self._heartbeat.age():.0f} s"
            if probe.silence() > MAX_SILENCE:
                return f"the server has not answered for {probe.silence():.0f} s"
        return "the server is stopping"

    def _died(self, process: subprocess.Popen[bytes]) -> bool:
        return process.poll() is not None or not all(map(is_running, self._launch.run.stubs()))

    def _kill(self) -> None:
        """Kill all processes of the server and remove its shared memory."""
        if self._probe:
            self._probe.close()
            self._probe = None
        if self._process:
            kill_group(self._process.pid)
            self._process.wait()
            self._launch.run.remove_shared_memory()


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
