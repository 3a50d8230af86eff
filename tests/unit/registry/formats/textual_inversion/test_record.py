"""The record of an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scumble.errors import IntegrityError
from scumble_registry.formats.safetensors_header import Array, write
from scumble_registry.formats.textual_inversion import read_record, write_record

DTYPES = [np.dtype("<f4"), np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16)]


def save(path: Path, **tensors: Array) -> Path:
    path.write_bytes(write(tensors, {}))
    return path


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-4, 4, width=16))
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_a_record_survives_being_written_and_read(values: Array, dtype: np.dtype[Any], tmp_path: Path) -> None:
    path = tmp_path / "record.safetensors"
    vectors = values.astype(dtype)
    path.write_bytes(write_record({"text_encoder": vectors}))
    read = read_record(path)
    assert list(read) == ["text_encoder"]
    assert (read["text_encoder"].dtype, read["text_encoder"].tobytes()) == (vectors.dtype, vectors.tobytes())
    assert write_record(read) == path.read_bytes()


def test_a_file_that_is_no_record_is_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="not an embedding's record"):
        read_record(save(tmp_path / "a.safetensors", cat=ones(3)))
