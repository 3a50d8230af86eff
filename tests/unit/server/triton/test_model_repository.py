"""The models' configurations say what the wire contract says."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from scumble.wire import INPUTS, STREAM_INPUTS, STREAM_OUTPUTS, UNARY_OUTPUTS, TensorSpec
from scumble_server.triton.launcher import default_model_repository

MODELS = {"scumble": (INPUTS, UNARY_OUTPUTS), "scumble_stream": (STREAM_INPUTS, STREAM_OUTPUTS)}


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_are_those_of_the_wire(name: str) -> None:
    text = (default_model_repository() / name / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    inputs, outputs = MODELS[name]
    assert config.name == name
    assert [as_spec(each, optional=each.optional) for each in config.input] == list(inputs)
    assert [as_spec(each, optional=True) for each in config.output] == list(outputs)
    assert config.model_transaction_policy.decoupled == (name == "scumble_stream")


def as_spec(tensor: model_config_pb2.ModelInput | model_config_pb2.ModelOutput, *, optional: bool) -> TensorSpec:
    datatype = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
    return TensorSpec(tensor.name, "BYTES" if datatype == "STRING" else datatype, tuple(tensor.dims), optional=optional)
