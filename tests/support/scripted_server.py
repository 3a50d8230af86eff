"""A gRPC server in this process that speaks Triton's protocol and answers as a test says.

It stands in for the transport's faults alone; what a real server does is tested against a real one, in tests/e2e.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from scumble import wire
from scumble.events import Done, Event
from support.kserve_server import infer_response, request_tensors
from support.receipts import a_receipt

Script = Callable[[wire.Tensors], Iterator[Event | str]]
"""What one request is answered with: events, or a text that Triton itself would report."""


class ScriptedServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """`script` answers; `requests` are the ids that came, `cancelled` is set once a caller has left."""

    def __init__(self) -> None:
        self.script: Script = lambda _: iter([a_picture()])
        self.requests: list[str] = []
        self.cancelled = threading.Event()
        self.ready = True
        self.port = 0

    def ModelStreamInfer(self, messages: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        finished = threading.Event()
        context.add_callback(lambda: finished.is_set() or self.cancelled.set())
        for message in messages:
            self.requests.append(message.id)
            for event in self.script(request_tensors(message)):
                if isinstance(event, str):
                    yield service_pb2.ModelStreamInferResponse(error_message=event)
                else:
                    response = infer_response(message.model_name, message.id, wire.event_to_tensors(event))
                    yield service_pb2.ModelStreamInferResponse(infer_response=response)
        finished.set()

    def ServerLive(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def ModelReady(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=self.ready)


def a_picture(**receipt: Any) -> Done:
    return Done(np.full((1, 8, 8, 3), 7, np.uint8), a_receipt(**receipt))
