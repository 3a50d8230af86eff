"""Model `scumble`: one response per request. It calls `scumble_stream`, which runs the loop.

Every request waits in its own thread, so the loop decides how many share a step.
"""

from __future__ import annotations

import logging
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scumble.errors import InvalidRequest, QueueFull, ScumbleError, Unavailable
from scumble.events import Failed
from scumble.wire import STREAM_MODEL, UNARY_OUTPUTS, event_to_tensors, in_base64
from scumble_server.config import ServerConfig
from scumble_server.logs import configure
from scumble_server.triton.backend import (
    Responder,
    Tensors,
    TritonRequest,
    call,
    read_inputs,
    read_parameters,
)
from scumble_server.triton.parameters import CALL, CANCEL, check, wants_text
from scumble_server.triton.run_folder import RunFolder
from scumble_server.triton.watchdog import Watchdog

CANCELLATION_INTERVAL = 0.1
OUTPUTS = [spec.name for spec in UNARY_OUTPUTS]
NO_IMAGES: NDArray[np.uint8] = np.zeros((0, 0, 0, 3), np.uint8)

log = logging.getLogger(__name__)


class TritonPythonModel:
    """Triton calls `initialize`, `execute` and `finalize`, from one thread."""

    def initialize(self, _args: dict[str, str]) -> None:
        config = ServerConfig.from_env()
        configure(config.log_format)
        self._watchdog = Watchdog(RunFolder.from_env())
        self._most = config.max_queue + 8  # the loop's queue is the limit; a few more learn of it there
        self._threads = ThreadPoolExecutor(self._most, "call")
        self._running: dict[str, Responder] = {}
        self._ended = threading.Event()
        self._canceller = threading.Thread(target=self._cancel_abandoned, name="canceller", daemon=True)
        self._canceller.start()

    def execute(self, requests: list[TritonRequest]) -> None:
        for request in requests:
            responder = Responder(request)
            if len(self._running) >= self._most:
                full = QueueFull(f"{self._most} requests are open; try again in a moment", retry_after=1.0)
                self._send(responder, event_to_tensors(Failed(full)))
                continue
            try:
                inputs, parameters = read_inputs(request), read_parameters(request)
                check(parameters)
            except ValueError as error:
                responder.refuse(str(error))
            except InvalidRequest as error:
                self._send(responder, event_to_tensors(Failed(error)))
            else:
                token = secrets.token_hex(16)
                self._running[token] = responder
                self._threads.submit(
                    self._answer, responder, inputs, token, request.request_id(), wants_text(parameters)
                )

    def finalize(self) -> None:
        self._threads.shutdown()
        self._ended.set()
        self._canceller.join()
        self._watchdog.close()

    def _answer(self, responder: Responder, inputs: Tensors, token: str, request_id: str, as_text: bool) -> None:
        try:
            outputs = _last_event(inputs, token, request_id)
            if as_text and "encoded" in outputs:
                outputs["encoded"] = in_base64(outputs["encoded"])
        except ScumbleError as error:
            outputs = event_to_tensors(Failed(error))
        except Exception as error:
            log.exception("a call failed")
            outputs = event_to_tensors(Failed(ScumbleError(f"internal error: {error!r}")))
        finally:
            del self._running[token]
        self._send(responder, outputs)

    def _send(self, responder: Responder, outputs: Tensors) -> None:
        try:
            responder.send(
                {"images": NO_IMAGES} | {name: outputs[name] for name in OUTPUTS if name in outputs}, final=True
            )
        except Exception:
            log.exception("a response could not be sent")

    def _cancel_abandoned(self) -> None:
        """Cancel the calls whose callers have gone."""
        while not self._ended.wait(CANCELLATION_INTERVAL):
            for token, responder in list(self._running.items()):
                if responder.is_cancelled():
                    _cancel(token)


def _last_event(inputs: Tensors, token: str, request_id: str) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for response in call(STREAM_MODEL, inputs, OUTPUTS, {CALL: token}, request_id=request_id):
        outputs = response
    if not outputs:
        raise Unavailable(f"model {STREAM_MODEL} ended without a response; try again")
    return outputs


def _cancel(token: str) -> None:
    empty: NDArray[np.object_] = np.array([b""], np.object_)
    for _ in call(STREAM_MODEL, {"prompt": empty}, OUTPUTS, {CANCEL: token}):
        pass
