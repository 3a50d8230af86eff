"""BYTES inputs are read as Triton's clients write them, and never more elements than a request has."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import serialize_byte_tensor

from scumble_server.triton.bytes_inputs import MAX_VALUES, deserialize


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_it_reads_what_tritonclient_writes(values: list[bytes]) -> None:
    array = np.array([*values, b""], np.object_)[:-1]
    encoded = serialize_byte_tensor(array)
    content = encoded.item() if encoded.size else b""
    assert deserialize(np.frombuffer(content, np.uint8)).tolist() == values


def test_as_many_as_are_read_are_read() -> None:
    assert deserialize(b"\1\0\0\0x" * MAX_VALUES).reshape((MAX_VALUES,)).tolist() == [b"x"] * MAX_VALUES


def test_millions_take_no_time_and_no_memory_and_keep_their_number() -> None:
    encoded = bytes(4 * 8_000_000)
    start = time.thread_time()
    array = deserialize(encoded).reshape((8_000_000,))
    assert time.thread_time() - start < 0.1
    assert array.shape == (8_000_000,)
    assert array.strides == (0,)


@pytest.mark.parametrize("encoded", [b"\1\0\0\0", b"\1\0", b"\xff\xff\xff\xffx"])
def test_what_is_cut_is_refused(encoded: bytes) -> None:
    with pytest.raises(struct.error):
        deserialize(encoded)
