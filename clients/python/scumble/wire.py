"""The tensors of requests and events in Triton's models.

Model `scumble_stream` (decoupled) answers one request with many responses, each one `Event`.
Model `scumble` (plain) answers with one: the outputs of the last event, without `event`.
Triton batches neither (`max_batch_size` 0). Only fields that are set are sent; the base's manifest has the defaults.

Laws: `tensors_to_request(request_to_tensors(r)) == r`, except for `guidance_scale`, which is sent as FP32 (7.3 arrives
as 7.300000190734863, which the receipt has too, so a receipt repeats exactly).
`tensors_to_event(event_to_tensors(e)) == e`. `seed` is exact. Texts are UTF-8; weights are JSON, so exact.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from scumble.errors import InvalidRequest, ScumbleError, from_dict
from scumble.events import Done, Event, Failed, Preview, Queued, Step
from scumble.receipt import Receipt
from scumble.request import MAX_ADAPTERS, Request
from scumble.stats import Stats
from scumble.tensors import load_bounded

STREAM_MODEL = "scumble_stream"
UNARY_MODEL = "scumble"
MAX_MESSAGE_BYTES = 2**31 - 1
"""The largest gRPC message in both directions; 16 images of 2048 x 2048 are 201 MB."""

Datatype: TypeAlias = Literal["BYTES", "FP32", "INT32", "INT64", "UINT8"]
Tensors: TypeAlias = Mapping[str, NDArray[Any]]

NUMPY: dict[Datatype, type[np.generic]] = {
    "BYTES": np.object_,
    "FP32": np.float32,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One line of a model's `config.pbtxt`."""

    name: str
    datatype: Datatype
    dims: tuple[int, ...] = (1,)
    optional: bool = True


INPUTS = (
    TensorSpec("prompt", "BYTES", optional=False),
    TensorSpec("negative_prompt", "BYTES"),
    TensorSpec("base", "BYTES"),
    TensorSpec("scheduler", "BYTES"),
    TensorSpec("seed", "INT64"),
    TensorSpec("steps", "INT64"),  # wide, as Triton would cut a larger number in silence
    TensorSpec("width", "INT64"),
    TensorSpec("height", "INT64"),
    TensorSpec("num_images", "INT64"),
    TensorSpec("guidance_scale", "FP32"),
    TensorSpec("adapters", "BYTES", (-1,)),  # JSON list of request.Adapter; or one each, as JSON or `ns/name:0.8`
    TensorSpec("options", "BYTES"),  # JSON, request.Options
    TensorSpec("images", "BYTES", (-1,)),  # name, image, name, image …: encoded, or a data: URL in base64
    TensorSpec("tensors", "BYTES"),  # safetensors
)
QUERY = TensorSpec("query", "BYTES")
"""An input of `scumble_stream` alone: `stats` returns the counters; the prompt is empty and nothing is generated."""
STREAM_INPUTS = (*INPUTS, QUERY)

UNARY_OUTPUTS = (
    TensorSpec("images", "UINT8", (-1, -1, -1, 3)),  # with Done
    TensorSpec("receipt", "BYTES"),  # JSON, with Done
    TensorSpec("error", "BYTES"),  # JSON, ScumbleError.to_dict(); alone
    TensorSpec("maps", "UINT8", (-1, -1, -1, 3)),  # with Done, if options.return_maps
    TensorSpec("encoded", "BYTES", (-1,)),  # with Done, if options.format: files (base64 in JSON); images is then empty
)
STREAM_OUTPUTS = (
    TensorSpec("event", "BYTES"),  # JSON: {type: queued|step|preview|done|failed, position | step, steps}
    *UNARY_OUTPUTS,
    TensorSpec("stats", "BYTES"),  # JSON, the response to the query
)

_JSON_FIELDS: dict[str, type[list[Any] | dict[str, Any]]] = {"adapters": list, "options": dict}
_MAX_TEXT_BYTES = 1 << 20
_MAX_TENSORS_BYTES = 16 << 20
_MAX_HEADER_BYTES = 64 << 10
_DATATYPES = {spec.name: spec.datatype for spec in STREAM_INPUTS}


def request_to_tensors(request: Request) -> dict[str, NDArray[Any]]:
    """Return the inputs of `request`; a field with its default value is left out."""
    inputs = {"images", "tensors"}
    given = request.model_dump(mode="json", exclude_defaults=True, exclude=inputs) | {"prompt": request.prompt}
    tensors = {name: _to_tensor(name, value) for name, value in given.items()}
    if request.images:
        tensors["images"] = _named_tensor(request.images)
    if request.tensors:
        tensors["tensors"] = _content_tensor(save({name: _plain(value) for name, value in request.tensors.items()}))
    return tensors


def tensors_to_request(tensors: Tensors) -> Request:
    """Validate the inputs; the server calls this once per request. Raises InvalidRequest naming the field."""
    given: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name == QUERY.name:
            continue
        if name == "images":
            given[name] = _from_named_tensor(tensor)
        elif name == "tensors":
            given[name] = _from_safetensors(tensor)
        elif name == "adapters":
            given[name] = _from_adapters_tensor(tensor)
        else:
            given[name] = _from_tensor(name, tensor)
    return Request.parse(given)


def event_to_tensors(event: Event, *, as_text: bool = False) -> dict[str, NDArray[Any]]:
    """Return the outputs of one response of `scumble_stream`; without `event`, those of `scumble`.

    `as_text`: they go into JSON, which has no bytes, so files are encoded in base64.
    """
    match event:
        case Queued(position):
            return {"event": _json_tensor({"type": "queued", "position": position})}
        case Step(step, steps):
            return {"event": _json_tensor({"type": "step", "step": step, "steps": steps})}
        case Preview(step, steps, images):
            return {"event": _json_tensor({"type": "preview", "step": step, "steps": steps}), "images": images}
        case Done(images, receipt, maps, encoded):
            done = {
                "event": _json_tensor({"type": "done"}),
                "images": images,
                "receipt": _json_tensor(receipt.to_json()),
            }
            done |= {"maps": maps} if maps is not None else {}
            if not encoded:
                return done
            files: NDArray[np.object_] = np.array([*encoded, b""], np.object_)[:-1]
            return done | {"encoded": in_base64(files) if as_text else files}
        case Failed(error):
            return {"event": _json_tensor({"type": "failed"}), "error": _json_tensor(error.to_dict())}


def in_base64(files: NDArray[np.object_]) -> NDArray[np.object_]:
    """`(n,)` bytes → the same in base64, which JSON can hold."""
    return np.array([*map(base64.b64encode, files), b""], np.object_)[:-1]


def tensors_to_event(tensors: Tensors) -> Event:
    """Read a response of either model. Raises ScumbleError if it is not an event."""
    try:
        data = _json_value(tensors["event"]) if "event" in tensors else {"type": _result_type(tensors)}
        match data["type"]:
            case "queued":
                return Queued(int(data["position"]))
            case "step":
                return Step(int(data["step"]), int(data["steps"]))
            case "preview":
                return Preview(int(data["step"]), int(data["steps"]), np.asarray(tensors["images"], np.uint8))
            case "done":
                maps = np.asarray(tensors["maps"], np.uint8) if "maps" in tensors else None
                files = tuple(bytes(content) for content in tensors.get("encoded", ()))
                receipt = Receipt.model_validate(_json_value(tensors["receipt"]))
                return Done(np.asarray(tensors["images"], np.uint8), receipt, maps, files)
            case "failed":
                return Failed(from_dict(_json_value(tensors["error"])))
            case unknown:
                raise ScumbleError(
                    f"the server sent an event of unknown type {unknown!r}; is it newer than this client?"
                )
    except (KeyError, TypeError, ValueError) as error:
        raise ScumbleError(f"the server sent an event that cannot be read: {error!r}") from error


def stats_query() -> dict[str, NDArray[Any]]:
    return {"prompt": _bytes_tensor(""), QUERY.name: _bytes_tensor("stats")}


def is_stats_query(tensors: Tensors) -> bool:
    """Return whether the inputs are the query `stats`. Raises InvalidRequest for any other query."""
    if QUERY.name not in tensors:
        return False
    query = _from_tensor(QUERY.name, tensors[QUERY.name])
    if query != "stats":
        raise InvalidRequest(f"query {query!r} is unknown; the only query is 'stats'", field=QUERY.name)
    return True


def stats_to_tensors(stats: Stats) -> dict[str, NDArray[Any]]:
    return {"stats": _json_tensor(stats.to_json())}


def tensors_to_stats(tensors: Tensors) -> Stats:
    """Read the response to the query. Raises the server's error, or ScumbleError if it is not a response."""
    if "error" in tensors:
        raise from_dict(_json_value(tensors["error"]))
    try:
        return Stats.model_validate(_json_value(tensors["stats"]))
    except (KeyError, ValueError) as error:
        raise ScumbleError(f"the server sent stats that cannot be read: {error}") from error


def _result_type(tensors: Tensors) -> str:
    return "failed" if "error" in tensors else "done"


def _to_tensor(name: str, value: Any) -> NDArray[Any]:
    if name in _JSON_FIELDS:
        return _json_tensor(value)
    if _DATATYPES[name] == "BYTES":
        try:
            return _bytes_tensor(value)
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{name}: not Unicode text ({error.reason})", field=name) from error
    return np.array([value], NUMPY[_DATATYPES[name]])


def _from_tensor(name: str, tensor: NDArray[Any]) -> Any:
    if tensor.size != 1:
        raise InvalidRequest(f"{name}: has {tensor.size} values, takes one", field=name)
    value = tensor.reshape(-1)[0]
    if _DATATYPES.get(name) != "BYTES":
        return value.item() if isinstance(value, np.generic) else value
    text = _text(name, value)
    return _parse_json(name, text, _JSON_FIELDS[name]) if name in _JSON_FIELDS else text


def _text(name: str, value: Any) -> str:
    if len(value) > _MAX_TEXT_BYTES:
        raise InvalidRequest(f"{name}: has {len(value)} bytes, at most {_MAX_TEXT_BYTES} are read", field=name)
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name}: not UTF-8 text ({error.reason} at {error.start})", field=name) from error


def _from_adapters_tensor(tensor: NDArray[Any]) -> list[Any]:
    """Return adapters as `Request.parse` takes them: each element is a JSON list, a JSON object, or `ns/name:0.8`."""
    if tensor.size > MAX_ADAPTERS:
        raise InvalidRequest(f"adapters: has {tensor.size} values, takes at most {MAX_ADAPTERS}", field="adapters")
    adapters: list[Any] = []
    for value in tensor.reshape(-1):
        text = _text("adapters", value).strip()
        if text.startswith("{"):
            adapters.append(_parse_json("adapters", text, dict))
        elif text.startswith("[") or not text:
            adapters += _parse_json("adapters", text, list)
        else:
            adapters.append(text)
    return adapters


def _parse_json(name: str, text: str, kind: type[list[Any] | dict[str, Any]]) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name}: not JSON ({error})", field=name) from error
    if not isinstance(value, kind):
        word = "list" if kind is list else "object"
        raise InvalidRequest(f"{name}: is a JSON {type(value).__name__}, takes a JSON {word}", field=name)
    return value


def _from_named_tensor(tensor: NDArray[Any]) -> dict[str, bytes]:
    if tensor.size % 2:
        raise InvalidRequest(f"images: has {tensor.size} values, takes a name and an image in turn", field="images")
    pairs = tensor.reshape(-1, 2)
    names = [_from_tensor("prompt", name) for name in pairs[:, :1]]
    if len(set(names)) < len(names):
        raise InvalidRequest("images: two images have the same name", field="images")
    return {name: _decoded(name, content) for name, content in zip(names, pairs[:, 1], strict=True)}


def _decoded(name: str, content: Any) -> bytes:
    """Return an image's bytes; as JSON over HTTP has no bytes, it may be a data: URL. Raises InvalidRequest."""
    encoded = content if isinstance(content, bytes) else str(content).encode()
    if not encoded.startswith(b"data:"):
        return encoded
    head, _, body = encoded.partition(b",")
    try:
        if not head.endswith(b";base64"):
            raise ValueError("not base64")
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise InvalidRequest(f"images: {name!r} is not a data: URL in base64 ({error})", field="images") from error


def _from_safetensors(tensor: NDArray[Any]) -> dict[str, NDArray[Any]]:
    content = tensor.reshape(-1)[0] if tensor.size == 1 else b""
    if not isinstance(content, bytes) or not 0 < len(content) <= _MAX_TENSORS_BYTES:
        raise InvalidRequest(
            f"tensors: takes one safetensors file of at most {_MAX_TENSORS_BYTES} bytes", field="tensors"
        )
    try:
        return load_bounded(content, _MAX_HEADER_BYTES)
    except ValueError as error:
        raise InvalidRequest(f"tensors: {error}", field="tensors") from error


def _plain(value: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(value)  # safetensors writes the memory without regard to strides


def _bytes_tensor(text: str) -> NDArray[np.object_]:
    return _content_tensor(text.encode())


def _content_tensor(content: bytes) -> NDArray[np.object_]:
    tensor: NDArray[np.object_] = np.empty(1, np.object_)  # np.array([b"a\0"]) would make it dtype S
    tensor[0] = content
    return tensor


def _named_tensor(images: Mapping[str, bytes]) -> NDArray[np.object_]:
    tensor: NDArray[np.object_] = np.empty(2 * len(images), np.object_)
    for index, (name, content) in enumerate(images.items()):
        tensor[2 * index : 2 * index + 2] = name.encode(), content
    return tensor


def _json_tensor(value: Any) -> NDArray[np.object_]:
    return _bytes_tensor(json.dumps(value, separators=(",", ":"), default=str))  # str: paths in an error's fields


def _json_value(tensor: NDArray[Any]) -> Any:
    return json.loads(tensor.reshape(-1)[0])
