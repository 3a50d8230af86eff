"""Triton's Python-backend API, typed. The only module that imports it; it is there inside a stub alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from scumble.errors import Unavailable

Tensors: TypeAlias = Mapping[str, NDArray[Any]]
Parameters: TypeAlias = dict[str, str | int | bool]

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"
"""What a stub logs goes through its stderr into the server's log."""


class Sender(Protocol):
    def send(self, response: Any = None, flags: int = 0) -> None: ...
    def is_cancelled(self) -> bool: ...


class TritonRequest(Protocol):
    def inputs(self) -> list[Any]: ...
    def parameters(self) -> str: ...
    def get_response_sender(self) -> Sender: ...


class Responder:
    """The way back to one caller, for any thread.

    Triton 2.51 crashes as a whole when it is asked about a caller that has its final response, so a lock
    keeps the question and that response apart.
    """

    def __init__(self, request: TritonRequest) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._ended = False

    def send(self, tensors: Tensors, *, final: bool) -> None:
        outputs = [pb_utils.Tensor(name, value) for name, value in tensors.items()]
        self._send(pb_utils.InferenceResponse(outputs), final=final)

    def refuse(self, message: str) -> None:
        """End with an error of Triton's own, for what is no request of ours at all."""
        error = pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
        self._send(pb_utils.InferenceResponse([], error), final=True)

    def is_cancelled(self) -> bool:
        """Ask Triton whether the caller has gone; some 40 µs. False once it has its final response."""
        with self._lock:
            return not self._ended and bool(self._sender.is_cancelled())

    def _send(self, response: Any, *, final: bool) -> None:
        with self._lock:
            self._ended = self._ended or final
            self._sender.send(response, flags=_flags(final))


def _flags(final: bool) -> int:
    return int(pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL) if final else 0


def read_inputs(request: TritonRequest) -> dict[str, NDArray[Any]]:
    """Copies: Triton takes the memory back when `execute` returns. Raises ValueError on bytes that are none."""
    try:
        return {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}
    except Exception as error:
        raise ValueError(f"an input cannot be read: {error}") from error


def read_parameters(request: TritonRequest) -> Parameters:
    parameters: Parameters = json.loads(request.parameters() or "{}")
    return parameters


def call(model: str, inputs: Tensors, outputs: list[str], parameters: Parameters) -> Iterator[dict[str, NDArray[Any]]]:
    """Call a decoupled model of this server; yield its responses. Raises Unavailable if it cannot answer."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=outputs,
        inputs=[pb_utils.Tensor(name, value) for name, value in inputs.items()],
        parameters=parameters,
    )
    try:
        for response in request.exec(decoupled=True):
            if response.has_error():
                raise Unavailable(f"model {model} did not answer: {response.error().message()}")
            if response.output_tensors():
                yield {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    except pb_utils.TritonModelException as error:
        raise Unavailable(f"model {model} did not answer: {error}") from error
