"""Model `scumble_stream`: owns the Service. Requests go to its loop, events are sent as responses.

`execute` only copies inputs: the Service reads them in threads of its own. So Triton can always deliver the next
request, and stats answer whatever is being read. The Service's queue is bounded; a request that does not fit gets
`queue_full` before it is read.
"""

from __future__ import annotations

import logging

from scumble.errors import ScumbleError
from scumble.events import Failed
from scumble.wire import is_stats_query, stats_to_tensors, tensors_to_request
from scumble_server.config import ServerConfig
from scumble_server.denoise.heartbeat import Heartbeat
from scumble_server.logs import configure
from scumble_server.memory.collection import collect_seldom
from scumble_server.service import Service
from scumble_server.triton.backend import (
    Parameters,
    Responder,
    Tensors,
    TritonRequest,
    read_inputs,
    read_parameters,
)
from scumble_server.triton.callers import Caller, InnerCaller, InnerCalls, WireCaller
from scumble_server.triton.heartbeat_file import HeartbeatFile
from scumble_server.triton.metrics import LoopMetrics
from scumble_server.triton.outbox import Outbox
from scumble_server.triton.parameters import CALL, CANCEL, check, wants_text
from scumble_server.triton.run_folder import RunFolder
from scumble_server.triton.watchdog import Watchdog

log = logging.getLogger(__name__)


class TritonPythonModel:
    """Triton calls `initialize`, `execute` and `finalize`, from one thread."""

    def initialize(self, _args: dict[str, str]) -> None:
        config = ServerConfig.from_env()
        configure(config.log_format)
        self._folder = RunFolder.from_env()
        self._watchdog = Watchdog(self._folder)
        self._service = _open_service(config, self._folder, HeartbeatFile(self._folder.path).beat)
        self._outbox = Outbox()
        self._inner_calls = InnerCalls()
        self._metrics = LoopMetrics(self._service.stats)
        collect_seldom()
        self._watchdog.on_stop = self._drain
        self._watchdog.on_death = self._outbox.flush  # what has failed is still told
        self._watchdog.is_healthy = self._service.is_alive

    def execute(self, requests: list[TritonRequest]) -> None:
        for request in requests:
            responder = Responder(request)
            try:
                tensors, parameters = read_inputs(request), read_parameters(request)
            except ValueError as error:
                responder.refuse(str(error))
            else:
                self._answer(request.request_id(), responder, tensors, parameters)

    def finalize(self) -> None:
        self._watchdog.close()
        self._metrics.close()
        self._service.close()
        self._outbox.close()

    def _drain(self) -> None:
        """Respond to every request before the server is stopped. Called from the watchdog."""
        self._service.close()
        self._outbox.flush()
        self._folder.say_drained()

    def _answer(self, request_id: str, responder: Responder, tensors: Tensors, parameters: Parameters) -> None:
        caller = self._caller(responder, parameters)
        try:
            if CANCEL in parameters:
                self._inner_calls.cancel(str(parameters[CANCEL]))
                self._outbox.put(responder, dict, final=True)
            elif is_stats_query(tensors):
                self._outbox.put(responder, lambda: stats_to_tensors(self._service.stats()), final=True)
            else:
                check(parameters)
                self._service.submit(
                    lambda: tensors_to_request(tensors), caller.on_event, caller.is_cancelled, request_id=request_id
                )
        except ScumbleError as error:
            caller.on_event(Failed(error))
        except Exception as error:
            log.exception("a request failed")
            caller.on_event(Failed(ScumbleError(f"internal error: {error!r}")))

    def _caller(self, responder: Responder, parameters: Parameters) -> Caller:
        if CALL in parameters:
            return InnerCaller(responder, self._outbox, self._inner_calls, str(parameters[CALL]))
        return WireCaller(responder, self._outbox, as_text=wants_text(parameters))


def _open_service(config: ServerConfig, run: RunFolder, heartbeat: Heartbeat) -> Service:
    try:
        return Service.open(config, heartbeat)
    except ScumbleError as error:
        run.write_failure(error)
        raise
    except Exception as error:
        run.write_failure(ScumbleError(f"the server could not start: {error!r}; the log has more"))
        raise
