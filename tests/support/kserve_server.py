"""The server's half of Triton's gRPC protocol: what `scumble.kserve` sends is read, what it reads is made."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from scumble.kserve import DATATYPES, read_tensors, to_raw
from scumble.wire import Tensors


def request_tensors(message: Any) -> dict[str, NDArray[Any]]:
    return read_tensors(message.inputs, message.raw_input_contents)


def infer_response(model: str, request_id: str, tensors: Tensors) -> Any:
    """A `ModelInferResponse`."""
    message = service_pb2.ModelInferResponse(model_name=model, id=request_id)
    for name, tensor in tensors.items():
        message.outputs.add(name=name, datatype=DATATYPES[tensor.dtype], shape=tensor.shape)
        message.raw_output_contents.append(to_raw(tensor))
    return message
