"""Convert named arrays to and from messages of Triton's gRPC protocol (KServe v2), with raw contents."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from scumble.wire import NUMPY, Datatype, Tensors

DATATYPES: dict[np.dtype[Any], Datatype] = {np.dtype(kind): datatype for datatype, kind in NUMPY.items()}


def infer_request(model: str, request_id: str, tensors: Tensors) -> Any:
    """Make a `ModelInferRequest`."""
    message = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, tensor in tensors.items():
        message.inputs.add(name=name, datatype=DATATYPES[tensor.dtype], shape=tensor.shape)
        message.raw_input_contents.append(to_raw(tensor))
    return message


def response_tensors(message: Any) -> dict[str, NDArray[Any]]:
    """Return arrays that the caller owns. Raises ValueError if contents and shapes disagree."""
    return read_tensors(message.outputs, message.raw_output_contents)


def read_tensors(described: Any, contents: Any) -> dict[str, NDArray[Any]]:
    pairs = zip(described, contents, strict=True)
    return {spec.name: _from_raw(raw, spec.datatype).reshape(tuple(spec.shape)) for spec, raw in pairs}


def to_raw(tensor: NDArray[Any]) -> bytes:
    if tensor.dtype == np.object_:
        return cast("bytes", serialize_byte_tensor(tensor).item()) if tensor.size else b""
    return tensor.tobytes()


def _from_raw(raw: bytes, datatype: str) -> NDArray[Any]:
    if datatype == "BYTES":
        return cast("NDArray[Any]", deserialize_bytes_tensor(raw))
    if datatype not in NUMPY:
        raise ValueError(f"datatype {datatype} is unknown; known are {', '.join(NUMPY)}")
    return np.frombuffer(raw, NUMPY[datatype]).copy()
