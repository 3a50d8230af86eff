"""Triton's Python-backend API, typed. The API exists only inside a stub process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from scumble.errors import Unavailable
from scumble_server.triton.bytes_inputs import MAX_VALUES, deserialize

Tensors: TypeAlias = Mapping[str, NDArray[Any]]
Parameters: TypeAlias = dict[str, str | int | bool]

pb_utils.deserialize_bytes_tensor = deserialize


class Sender(Protocol):
    def send(self, response: Any = None, flags: int = 0) -> None: ...
    def is_cancelled(self) -> bool: ...


class TritonRequest(Protocol):
    def inputs(self) -> list[Any]: ...
    def parameters(self) -> str: ...
    def request_id(self) -> str: ...
    def get_response_sender(self) -> Sender: ...


class Responder:
    """Sends responses to one caller. Any thread may call it.

    Triton 2.51 crashes if `is_cancelled` is called for a request that has its final response, so a lock keeps the two
    apart.
    """

    def __init__(self, request: TritonRequest) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._ended = False

    def send(self, tensors: Tensors, *, final: bool) -> None:
        outputs = [pb_utils.Tensor(name, value) for name, value in tensors.items()]
        self._send(pb_utils.InferenceResponse(outputs), final=final)

    def refuse(self, message: str) -> None:
        """Send a Triton error as the final response, for input that is not a request of ours."""
        error = pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
        self._send(pb_utils.InferenceResponse([], error), final=True)

    def is_cancelled(self) -> bool:
        """Return whether the caller cancelled or disconnected, in about 40 µs; False after the final response."""
        with self._lock:
            return not self._ended and bool(self._sender.is_cancelled())

    def _send(self, response: Any, *, final: bool) -> None:
        with self._lock:
            self._ended = self._ended or final
            self._sender.send(response, flags=_flags(final))


def _flags(final: bool) -> int:
    return int(pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL) if final else 0


def read_inputs(request: TritonRequest) -> dict[str, NDArray[Any]]:
    """Copy the inputs, whose memory Triton frees when `execute` returns.

    Raises ValueError for malformed BYTES, and for more values than any request has, before they are copied.
    """
    try:
        inputs = request.inputs()
        for tensor in inputs:
            if len(tensor.shape()) == 1 and tensor.shape()[0] > MAX_VALUES:
                raise ValueError(f"{tensor.name()} has {tensor.shape()[0]} values, at most {MAX_VALUES} are read")
        return {tensor.name(): np.array(tensor.as_numpy()) for tensor in inputs}
    except Exception as error:
        raise ValueError(f"an input cannot be read: {error}") from error


def read_parameters(request: TritonRequest) -> Parameters:
    parameters: Parameters = json.loads(request.parameters() or "{}")
    return parameters


def call(
    model: str, inputs: Tensors, outputs: list[str], parameters: Parameters, *, request_id: str = ""
) -> Iterator[dict[str, NDArray[Any]]]:
    """Call a decoupled model of this server and yield its responses. Raises Unavailable if it does not respond."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        request_id=request_id,
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
