"""NVIDIA's own clients as the other side of the wire."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from scumble.request import Request
from scumble.wire import request_to_tensors
from scumble_server.triton.running import RunningServer

DATATYPES = {"object": "BYTES", "int32": "INT32", "int64": "INT64", "float32": "FP32"}


def inputs_of(module: Any, request: Request | dict[str, np.ndarray]) -> list[Any]:
    tensors = request_to_tensors(request) if isinstance(request, Request) else request
    inputs = []
    for name, value in tensors.items():
        inputs.append(module.InferInput(name, list(value.shape), DATATYPES[str(value.dtype)]))
        inputs[-1].set_data_from_numpy(value)
    return inputs


@pytest.fixture
def http(server: RunningServer) -> Iterator[Any]:
    with tritonclient.http.InferenceServerClient(
        server.http_url.removeprefix("http://"), concurrency=8, network_timeout=60
    ) as client:
        yield client


@pytest.fixture
def grpc(server: RunningServer) -> Iterator[Any]:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        yield client


@pytest.fixture
def infer_http(http: Any) -> Callable[..., Any]:
    return lambda request: http.infer("scumble", inputs_of(tritonclient.http, request))


@pytest.fixture
def infer_grpc(grpc: Any) -> Callable[..., Any]:
    return lambda request: grpc.infer("scumble", inputs_of(tritonclient.grpc, request), client_timeout=60)


class Stream:
    """One gRPC stream; `send` a request and take its responses."""

    def __init__(self, url: str) -> None:
        self._client = tritonclient.grpc.InferenceServerClient(url)
        self._responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: self._responses.put((result, error)))

    def send(self, request: Request | dict[str, np.ndarray]) -> None:
        self._client.async_stream_infer("scumble_stream", inputs_of(tritonclient.grpc, request))

    def take(self) -> Any:
        result, error = self._responses.get(timeout=60)
        if error:
            raise error
        return result

    def take_all(self) -> list[Any]:
        """Up to the one with the final flag."""
        results = [self.take()]
        while not results[-1].get_response().parameters["triton_final_response"].bool_param:
            results.append(self.take())
        return results

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


@pytest.fixture
def stream(server: RunningServer) -> Iterator[Stream]:
    opened = Stream(server.grpc_url)
    yield opened
    opened.close()
