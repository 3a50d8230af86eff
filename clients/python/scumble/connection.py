"""One gRPC channel to one Triton server, for any number of threads: every call is a stream of its own."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import grpc
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from scumble import kserve
from scumble.addresses import is_loopback
from scumble.errors import Cancelled, InvalidRequest, ScumbleError, Unavailable
from scumble.wire import MAX_MESSAGE_BYTES, Tensors

_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),  # reconnects to a restarted server soon
    ("grpc.max_reconnect_backoff_ms", 2000),
)
_ADDRESS_HINT = "give the gRPC address that `scumble serve` prints"


class Connection:
    """Owns the channel until `close`, which ends running calls with Cancelled."""

    def __init__(self, url: str) -> None:
        self.url = url
        target, secure = parse_url(url)
        options = channel_options(target)
        if secure:
            self._channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(), options=options)
        else:
            self._channel = grpc.insecure_channel(target, options=options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def stream(
        self, model: str, request_id: str, tensors: Tensors, timeout: float | None
    ) -> Generator[dict[str, NDArray[Any]]]:
        """Yield every response to one request of a decoupled model, as it arrives.

        Closing the generator cancels the request on the server. Raises Unavailable or Cancelled.
        """
        message = kserve.infer_request(model, request_id, tensors)
        call = self._stub.ModelStreamInfer(iter([message]), timeout=timeout)
        try:
            for answer in call:
                if answer.error_message:
                    raise Unavailable(
                        f"the server at {self.url} could not run {model!r}: {answer.error_message}",
                        url=self.url,
                    )
                if answer.infer_response.outputs:
                    yield kserve.response_tensors(answer.infer_response)
        except grpc.RpcError as error:
            raise explain(error, self.url, timeout) from error
        except ValueError as error:
            raise ScumbleError(f"the server at {self.url} sent a response that cannot be read: {error}") from error
        finally:
            call.cancel()

    def is_live(self, timeout: float | None) -> bool:
        return bool(self._call("ServerLive", service_pb2.ServerLiveRequest(), timeout).live)

    def is_ready(self, model: str, timeout: float | None) -> bool:
        return bool(self._call("ModelReady", service_pb2.ModelReadyRequest(name=model), timeout).ready)

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: str, message: Any, timeout: float | None) -> Any:
        try:
            return getattr(self._stub, method)(message, timeout=timeout)
        except grpc.RpcError as error:
            raise explain(error, self.url, timeout) from error


def explain(error: Any, url: str, timeout: float | None) -> ScumbleError:
    """Make the typed error of a failed call (`grpc.RpcError`)."""
    detail = error.details()
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            text = f"no Scumble server answers at {url} ({detail}); start one with `scumble serve`"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            text = f"the server at {url} gave no result within {timeout:.3g} s"
        case grpc.StatusCode.CANCELLED:
            return Cancelled("the request was cancelled", url=url)
        case grpc.StatusCode.UNIMPLEMENTED:
            text = f"the server at {url} is not a Triton server; {_ADDRESS_HINT}"
        case code:
            text = f"the call to {url} failed: {code.name}: {detail}"
    return Unavailable(text, url=url)


def channel_options(target: str) -> list[tuple[str, int]]:
    """Return gRPC's options for `host:port`. No proxy leads to this machine's own addresses."""
    direct = is_loopback(target.rpartition(":")[0])
    return [*_OPTIONS, *([("grpc.enable_http_proxy", 0)] if direct else [])]


def parse_url(url: str) -> tuple[str, bool]:
    """Return target and whether to encrypt, of `host:port`, `grpc://host:port` or `grpcs://host:port`.

    Raises InvalidRequest.
    """
    scheme, separator, rest = url.rpartition("://")
    host, colon, port = rest.rstrip("/").rpartition(":")
    if scheme not in ("", "grpc", "grpcs") or (separator and not scheme) or not (host and colon and port.isdigit()):
        raise InvalidRequest(f"url {url!r}: {_ADDRESS_HINT}, as host:port or grpc[s]://host:port", field="url")
    return f"{host}:{port}", scheme == "grpcs"
