"""Asks the Triton server over gRPC, for any number of callers at once."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from scumble import kserve
from scumble.connection import channel_options, explain, parse_url
from scumble.errors import ScumbleError, Unavailable
from scumble.events import Done, Failed, StreamEvent
from scumble.request import Request
from scumble.stats import Stats
from scumble.wire import STREAM_MODEL, Tensors, request_to_tensors, stats_query, tensors_to_event, tensors_to_stats

SECONDS_TO_ANSWER = 5.0
"""For questions that no drawing precedes."""


class Upstream:
    """Owns one channel until `close`. Used by one event loop."""

    def __init__(self, url: str) -> None:
        self.url = url
        target, secure = parse_url(url)
        options = channel_options(target)
        if secure:
            self._channel = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(), options=options)
        else:
            self._channel = grpc.aio.insecure_channel(target, options=options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def draw(self, request: Request, request_id: str) -> AsyncGenerator[StreamEvent]:
        """Yield the events of a request, Done as the last one. Closing the generator cancels it on the server.

        Raises the server's error, or Unavailable.
        """
        async with aclosing(self._stream(request_id, request_to_tensors(request), None)) as answers:
            async for tensors in answers:
                event = tensors_to_event(tensors)
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Done):
                    return
        raise Unavailable("the model ended the request without an answer", url=self.url)

    async def stats(self) -> Stats:
        """Raises Unavailable."""
        async with aclosing(self._stream("stats", stats_query(), SECONDS_TO_ANSWER)) as answers:
            async for tensors in answers:
                return tensors_to_stats(tensors)
        raise Unavailable("the model ended the call without an answer", url=self.url)

    async def is_ready(self) -> bool:
        """Tell whether the model would draw: its stub answers, and none of its threads has died."""
        try:
            return (await self.stats()).alive
        except ScumbleError:
            return False

    async def close(self) -> None:
        """End running calls with Cancelled."""
        await self._channel.close()

    async def _stream(
        self,
        request_id: str,
        tensors: Tensors,
        timeout: float | None,  # noqa: ASYNC109 - gRPC's own, which the server sees
    ) -> AsyncGenerator[dict[str, NDArray[Any]]]:
        call = self._stub.ModelStreamInfer(
            _once(kserve.infer_request(STREAM_MODEL, request_id, tensors)), timeout=timeout
        )
        try:
            async for answer in call:
                if answer.error_message:
                    raise Unavailable(f"the model cannot be run: {answer.error_message}", url=self.url)
                if answer.infer_response.outputs:
                    yield kserve.response_tensors(answer.infer_response)
        except grpc.RpcError as error:
            raise explain(error, self.url, timeout) from error
        finally:
            call.cancel()


async def _once(message: service_pb2.ModelInferRequest) -> AsyncGenerator[service_pb2.ModelInferRequest]:
    yield message
