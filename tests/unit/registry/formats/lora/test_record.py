"""The record of a LoRA: one spelling of its factors."""

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
from scumble_registry.formats.lora import LoraModule, LoraRecord, read_record, write_record
from scumble_registry.formats.lora.record import make_module

DTYPES = [np.dtype("<f4"), np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16)]


@st.composite
def modules(draw: st.DrawFn) -> LoraModule:
    rank, out, width, side = (draw(st.integers(1, 4)) for _ in range(4))
    kernel: tuple[int, ...] = draw(st.sampled_from([(), (side, side)]))
    dtype = draw(st.sampled_from(DTYPES))
    values = st.floats(-4, 4, width=16)
    down = draw(hnp.arrays(np.float32, (rank, width, *kernel), elements=values)).astype(dtype)
    up = draw(hnp.arrays(np.float32, (out, rank, *(1 for _ in kernel)), elements=values)).astype(dtype)
    return make_module("a", down, up, draw(st.floats(0.015625, 512, width=32)))


RECORDS = st.dictionaries(st.from_regex(r"unet\.[a-z0-9.]{1,8}", fullmatch=True), modules(), max_size=4)


def same(one: LoraRecord, other: LoraRecord) -> bool:
    def bits(module: LoraModule) -> tuple[Any, ...]:
        arrays = [(a.dtype, a.shape, a.tobytes()) for a in (module.down, module.up)]
        return (*arrays, module.alpha)

    return {n: bits(m) for n, m in one.items()} == {n: bits(m) for n, m in other.items()}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=RECORDS)
def test_a_record_survives_being_written_and_read_and_has_one_spelling(record: LoraRecord, tmp_path: Path) -> None:
    path = tmp_path / "record.safetensors"
    path.write_bytes(write_record(record))
    assert same(read_record(path), record)
    assert write_record(read_record(path)) == path.read_bytes()
    assert write_record(dict(reversed(record.items()))) == path.read_bytes()


def test_a_file_that_is_no_record_is_an_integrity_error(lora: Path) -> None:
    with pytest.raises(IntegrityError, match="not a LoRA record"):
        read_record(lora)
