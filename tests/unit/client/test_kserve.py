"""Arrays in KServe's messages: tritonclient writes and reads the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.grpc import InferInput, service_pb2
from tritonclient.utils import np_to_triton_dtype

from scumble.kserve import DATATYPES, infer_request, read_tensors, to_raw
from scumble.wire import NUMPY

NUMBERS = [np.dtype(kind) for kind in NUMPY.values() if np.dtype(kind) != np.object_]
SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
ARRAYS = st.sampled_from(NUMBERS).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES))
TEXTS = st.lists(st.binary(max_size=9), max_size=5).map(lambda texts: np.array(texts, dtype=np.object_))


@settings(deadline=None)
@given(array=ARRAYS | TEXTS)
def test_what_is_sent_is_read_and_is_what_tritonclient_sends(array: np.ndarray[Any, Any]) -> None:
    message = infer_request("m", "id", {"a": array})
    read = read_tensors(message.inputs, message.raw_input_contents)["a"]
    assert (read.dtype, read.shape) == (array.dtype, array.shape)
    assert np.array_equal(read, array, equal_nan=array.dtype.kind == "f")
    theirs = InferInput("a", array.shape, np_to_triton_dtype(array.dtype))
    theirs.set_data_from_numpy(array)
    assert theirs._get_content() == to_raw(array) or not array.size
    assert message.inputs[0].datatype == theirs.datatype() == DATATYPES[array.dtype]


def test_what_is_read_is_the_callers_own() -> None:
    message = infer_request("m", "id", {"a": np.zeros(2, np.float32)})
    read_tensors(message.inputs, message.raw_input_contents)["a"][0] = 1


def test_what_disagrees_is_a_value_error() -> None:
    spec = service_pb2.ModelInferRequest().inputs.add(name="a", datatype="FP32", shape=[3])
    for specs, contents in (([spec], [bytes(8)]), ([spec], []), ([], [bytes(4)])):
        with pytest.raises(ValueError, match=r"reshape|zip"):
            read_tensors(specs, contents)
    spec.datatype = "FP64"
    with pytest.raises(ValueError, match="FP64"):
        read_tensors([spec], [bytes(24)])
