"""The wire carries requests and events without loss, and names what does not belong on it."""

import json
import time
from typing import Any, get_args

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from scumble import kserve, wire
from scumble.errors import InvalidRequest, NotFound, QueueFull, ScumbleError
from scumble.events import Done, Failed, Preview, Queued, Step
from scumble.request import Adapter, Options, Request, SchedulerName, TimestepSpacing
from support.kserve_server import request_tensors
from support.receipts import a_receipt, a_receipt_of, some_stats

texts = st.text(st.characters(exclude_categories=["Cs"]))
weights = st.floats(-100, 100)
sizes = st.integers(1, 256).map(lambda eighths: 8 * eighths)
fractions = st.floats(0, 1)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)
adapters = st.builds(
    Adapter,
    ref=texts,
    weight=weights,
    text_weight=st.none() | weights,
    blocks=st.none() | st.dictionaries(texts, weights, max_size=3) | st.lists(weights, max_size=3).map(tuple),
    start=fractions,
    end=fractions,
    images=st.lists(names, max_size=3).map(tuple),
    masks=st.lists(names, max_size=3).map(tuple),
    scale=st.none() | fractions | st.just({"down": {"block_2": (0.0, 1.0)}, "up": 0.5}),
    mode=st.none() | st.sampled_from(["balanced", "prompt", "control", "guess"]),
    preprocess=st.none() | st.just("canny") | st.just({"name": "canny", "low": 10}),
)
options = st.builds(
    Options,
    priority=st.integers(-10, 10),
    deadline_ms=st.none() | st.integers(1, 1000),
    preview_every=st.none() | st.integers(1, 100),
    return_maps=st.booleans(),
    timestep_spacing=st.none() | st.sampled_from(get_args(TimestepSpacing)),
    rescale_betas=st.none() | st.booleans(),
    eta=st.none() | st.floats(0, 1),
)
arrays = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=4).map(lambda values: np.array(values, np.float32))
requests = st.builds(
    Request,
    prompt=texts,
    negative_prompt=st.none() | texts,
    base=st.none() | texts,
    scheduler=st.none() | st.sampled_from(get_args(SchedulerName)),
    seed=st.none() | st.integers(0, 2**63 - 1),
    steps=st.none() | st.integers(1, 1000),
    width=st.none() | sizes,
    height=st.none() | sizes,
    num_images=st.integers(1, 16),
    guidance_scale=st.none() | st.floats(0, 100, width=32),
    adapters=st.lists(adapters, max_size=4).map(tuple),
    options=options,
    images=st.dictionaries(names, st.binary().filter(lambda content: not content.startswith(b"data:")), max_size=3),
    tensors=st.dictionaries(names, arrays, max_size=3),
)


def text(*values: str | bytes) -> NDArray[np.object_]:
    tensor = np.empty(len(values), np.object_)
    tensor[:] = [value.encode() if isinstance(value, str) else value for value in values]
    return tensor


def test_a_picture_may_come_as_a_data_url() -> None:
    tensors = {"prompt": text(""), "images": text("a", b"data:image/png;base64,iVBORw==")}
    assert wire.tensors_to_request(tensors).images == {"a": b"\x89PNG"}


@pytest.mark.parametrize(
    "values",
    [
        ['[{"ref": "a/b", "weight": 0.5}, {"ref": "a/c"}]'],
        ['[{"ref": "a/b", "weight": 0.5}, "a/c"]'],
        ['{"ref": "a/b", "weight": 0.5}', "a/c"],
        ["a/b:0.5", '["a/c"]'],
    ],
)
def test_adapters_may_be_one_list_or_one_each_as_json_or_text(values: list[str]) -> None:
    request = wire.tensors_to_request({"prompt": text(""), "adapters": text(*values)})
    assert request.adapters == (Adapter(ref="a/b", weight=0.5), Adapter(ref="a/c"))


def over_the_network(tensors: wire.Tensors) -> wire.Tensors:
    """Through the bytes of Triton's protocol."""
    message = kserve.infer_request("m", "id", tensors)
    return request_tensors(type(message).FromString(message.SerializeToString()))


@given(requests)
def test_a_request_arrives_as_it_was_sent(request_: Request) -> None:
    assert wire.tensors_to_request(over_the_network(wire.request_to_tensors(request_))) == request_


@given(requests)
def test_tensors_have_the_datatypes_and_dims_of_the_contract(request_: Request) -> None:
    specs = {spec.name: spec for spec in wire.INPUTS}
    for name, tensor in wire.request_to_tensors(request_).items():
        assert tensor.dtype == np.dtype(wire.NUMPY[specs[name].datatype])
        dims = zip(tensor.shape, specs[name].dims, strict=True)
        assert all(expected in {size, -1} for size, expected in dims)


@given(st.floats(0, 100))
def test_guidance_arrives_as_the_nearest_fp32_and_repeats_exactly(scale: float) -> None:
    first = wire.tensors_to_request(wire.request_to_tensors(Request(prompt="", guidance_scale=scale)))
    assert first.guidance_scale == float(np.float32(scale))
    assert wire.tensors_to_request(wire.request_to_tensors(first)) == first


def test_only_what_was_given_is_sent() -> None:
    assert set(wire.request_to_tensors(Request(prompt=""))) == {"prompt"}
    assert set(wire.request_to_tensors(Request(prompt="", negative_prompt="", steps=4))) == {
        "prompt",
        "negative_prompt",
        "steps",
    }


@pytest.mark.parametrize(
    ("field", "tensors"),
    [
        ("prompt", {}),
        ("prompt", {"prompt": text(b"\xff")}),
        ("prompt", {"prompt": text("a", "b")}),
        ("steps", {"prompt": text(""), "steps": np.array([0], np.int64)}),
        ("seed", {"prompt": text(""), "seed": np.array([-1], np.int64)}),
        ("width", {"prompt": text(""), "width": np.array([65], np.int64)}),
        ("guidance_scale", {"prompt": text(""), "guidance_scale": np.array([np.nan], np.float32)}),
        ("scheduler", {"prompt": text(""), "scheduler": text("magic")}),
        ("adapters", {"prompt": text(""), "adapters": text("[")}),
        ("adapters", {"prompt": text(""), "adapters": text('{"ref": "a/b"')}),
        ("adapters", {"prompt": text(""), "adapters": text("")}),
        ("adapters.1.ref", {"prompt": text(""), "adapters": text('{"ref": "a/b"}', "{}")}),
        ("adapters.weight", {"prompt": text(""), "adapters": text("a/b:much")}),
        ("adapters", {"prompt": text(""), "adapters": text("[" * 100_000)}),
        ("adapters.0.weight", {"prompt": text(""), "adapters": text('[{"ref": "a/b", "weight": NaN}]')}),
        ("adapters.1.ref", {"prompt": text(""), "adapters": text('[{"ref": "a/b"}, {}]')}),
        ("options.theta", {"prompt": text(""), "options": text('{"theta": 1}')}),
        ("options.eta", {"prompt": text(""), "options": text('{"eta": 1.5}')}),
        ("options.timestep_spacing", {"prompt": text(""), "options": text('{"timestep_spacing": "even"}')}),
        ("options.priority", {"prompt": text(""), "options": text('{"priority": 11}')}),
        ("options", {"prompt": text(""), "options": text("[]")}),
        ("images", {"prompt": text(""), "images": text("picture")}),
        ("images", {"prompt": text(""), "images": text("a", b"1", "a", b"2")}),
        ("images", {"prompt": text(""), "images": text("a", b"data:image/png;base64,!")}),
        ("images", {"prompt": text(""), "images": text("a", b"data:image/png,raw")}),
        ("tensors", {"prompt": text(""), "tensors": text("embeddings")}),
        ("colour", {"prompt": text(""), "colour": text("red")}),
    ],
)
def test_bad_input_is_refused_by_name(field: str, tensors: wire.Tensors) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.tensors_to_request(tensors)
    assert caught.value.fields["field"] == field


def test_text_that_is_no_unicode_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        wire.request_to_tensors(Request.model_construct(prompt="\ud800"))


def test_previews_and_maps_arrive_as_they_were_sent() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    preview = wire.tensors_to_event(over_the_network(wire.event_to_tensors(Preview(2, 20, pixels))))
    assert isinstance(preview, Preview)
    assert (preview.step, preview.steps, preview.images.tolist()) == (2, 20, pixels.tolist())
    done = wire.tensors_to_event(over_the_network(wire.event_to_tensors(Done(pixels, a_receipt(), pixels + 1))))
    assert isinstance(done, Done)
    assert done.maps is not None
    assert done.maps.tolist() == (pixels + 1).tolist()


@pytest.mark.parametrize("event", [Queued(3), Step(2, 20)])
def test_progress_arrives_as_it_was_sent(event: Queued | Step) -> None:
    assert wire.tensors_to_event(wire.event_to_tensors(event)) == event


def test_pictures_and_receipt_arrive_as_they_were_sent() -> None:
    pixels = np.arange(2 * 8 * 16 * 3, dtype=np.uint8).reshape(2, 8, 16, 3)
    tensors = wire.event_to_tensors(Done(pixels, a_receipt_of(prompt="né")))
    for sent in (tensors, {name: tensors[name] for name in ("images", "receipt")}):  # stream, unary
        received = wire.tensors_to_event(sent)
        assert isinstance(received, Done)
        assert received.receipt == a_receipt_of(prompt="né")
        np.testing.assert_array_equal(received.images, pixels)


@pytest.mark.parametrize("error", [NotFound("no such adapter", ref="a/b"), QueueFull("full", retry_after=0.5)])
def test_an_error_keeps_its_type_message_and_fields(error: ScumbleError) -> None:
    received = wire.tensors_to_event(wire.event_to_tensors(Failed(error)))
    assert isinstance(received, Failed)
    assert type(received.error) is type(error)
    assert received.error.to_dict() == error.to_dict()


@pytest.mark.parametrize(
    "tensors",
    [{}, {"event": text("{}")}, {"event": text('{"type":"done"}')}, {"event": text('{"type":"preview"}')}],
)
def test_an_event_that_cannot_be_read_is_an_error_of_ours(tensors: wire.Tensors) -> None:
    with pytest.raises(ScumbleError):
        wire.tensors_to_event(tensors)


def test_stats_are_asked_for_by_query_and_keep_their_numbers() -> None:
    assert wire.is_stats_query(wire.stats_query())
    assert not wire.is_stats_query(wire.request_to_tensors(Request(prompt="stats")))
    stats = some_stats(steps=7, batch_sizes={1: 2, 8: 5})
    assert wire.tensors_to_stats(wire.stats_to_tensors(stats)) == stats
    with pytest.raises(InvalidRequest, match="query"):
        wire.is_stats_query({"query": text("secrets")})


def test_the_models_are_configured_with_the_contract(pytestconfig: pytest.Config) -> None:
    for model, inputs, outputs in (
        (wire.STREAM_MODEL, wire.STREAM_INPUTS, wire.STREAM_OUTPUTS),
        (wire.UNARY_MODEL, wire.INPUTS, wire.UNARY_OUTPUTS),
    ):
        path = pytestconfig.rootpath / "model_repository" / model / "config.pbtxt"
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        assert config.max_batch_size == 0
        assert [_spec(tensor, optional=tensor.optional) for tensor in config.input] == [*inputs]
        assert [_spec(tensor, optional=True) for tensor in config.output] == [*outputs]


def _spec(tensor: Any, *, optional: bool) -> wire.TensorSpec:
    datatype = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
    return wire.TensorSpec(tensor.name, datatype, tuple(tensor.dims), optional=optional)


def test_events_are_json_that_any_language_reads() -> None:
    event = wire.event_to_tensors(Step(1, 2))["event"][0]
    assert json.loads(event) == {"type": "step", "step": 1, "steps": 2}


def test_a_header_of_more_tensors_than_a_request_may_have_is_refused_before_it_is_read() -> None:
    header = json.dumps(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    ).encode()
    content = len(header).to_bytes(8, "little") + header
    start = time.thread_time()
    with pytest.raises(InvalidRequest, match="a header of more than 65536 bytes"):
        wire.tensors_to_request({"prompt": text(""), "tensors": text(content)})
    assert time.thread_time() - start < 0.1
