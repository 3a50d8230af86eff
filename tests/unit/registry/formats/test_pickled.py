"""Pickled weights: torch is the oracle for what is read, and files that are made to hurt for what is not."""

from __future__ import annotations

import re
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scumble_registry.formats.pickled import Placeholder
from scumble_registry.formats.pickled.machine import Unsound
from support.hostile_pickles import CANARY, hostile, saved, sound, zipped
from support.pickled_reading import check, read_here

SOUND = sound()
HOSTILE = hostile()
"""Through the process too, which takes its time to start."""


@pytest.mark.parametrize("name", SOUND)
def test_what_torch_saves_is_read_as_torch_reads_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(SOUND[name])
    tree, tensors = read_here(tmp_path / "a.pt")
    check(tree, torch.load(BytesIO(SOUND[name]), weights_only=False), tensors)
    assert not tensors


def test_a_file_of_the_other_byte_order_is_turned(tmp_path: Path) -> None:
    ours = {"wide": torch.arange(6.0).reshape(2, 3), "half": torch.arange(3).half(), "whole": torch.arange(9)[::2]}
    with zipfile.ZipFile(BytesIO(saved(ours))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["archive/byteorder"] = b"big"
    for name, kind in {"archive/data/0": "<f4", "archive/data/1": "<f2", "archive/data/2": "<i8"}.items():
        entries[name] = np.frombuffer(entries[name], kind).byteswap().tobytes()
    (tmp_path / "a.pt").write_bytes(zipped(list(entries.items())))
    tree, tensors = read_here(tmp_path / "a.pt")
    check(tree, ours, tensors)


DTYPES = st.sampled_from(
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ]
)
VIEWS = [
    lambda t: t,
    lambda t: torch.nn.Parameter(t, requires_grad=False),
    lambda t: t.t() if t.dim() == 2 else t,
    lambda t: t[..., ::2] if t.dim() else t,
    lambda t: t[1:] if t.dim() else t,
    lambda t: t.permute(tuple(reversed(range(t.dim())))),
    lambda t: t.unsqueeze(0),
]


@st.composite
def tensors_of(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    tensor = (torch.rand(shape, generator=seed) * 100).to(draw(DTYPES))
    for view in draw(st.lists(st.sampled_from(VIEWS), max_size=2)):
        tensor = view(tensor)
    return tensor


WORDS = st.text("ab_*<>é 0", max_size=4)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | WORDS


@st.composite
def trees(draw: st.DrawFn) -> Any:
    """Of tensors, some of which stand in it twice or share their storage."""
    pool = draw(st.lists(tensors_of(), min_size=1, max_size=3))
    shared = [view(tensor) for tensor in pool for view in (VIEWS[0], VIEWS[3])]
    keys = WORDS | st.integers(1, 5000)
    tree = st.recursive(
        PLAIN | st.sampled_from(shared),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(keys, inner, max_size=3)
            | st.dictionaries(WORDS, inner, max_size=3).map(OrderedDict)
            | st.tuples(inner, inner)
        ),
        max_leaves=8,
    )
    return {"first": pool[0], "rest": draw(tree)}


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(tree=trees(), old=st.booleans())
def test_any_tree_of_tensors_reads_back_equal(tree: Any, old: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(saved(tree, old=old))
    try:
        found, tensors = read_here(path)
    except Unsound as error:
        assert "two tensors of one name" in str(error)  # noqa: PT017 - `a.b` and `a` → `b`, or 1 and "1"
        return
    check(found, torch.load(path, weights_only=True), tensors)
    assert not tensors


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_made_to_hurt_is_refused_and_nothing_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, says = HOSTILE[name]
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(Unsound, match=says if "|" in says else re.escape(says)):
        read_here(tmp_path / "a.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"], CANARY


def test_tensors_inside_unknown_objects_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(saved({"t": torch.ones(1), "module": torch.nn.Linear(2, 2)}))
    tree, tensors = read_here(tmp_path / "a.pt")
    assert tree["module"] == Placeholder("torch.nn.modules.linear.Linear", tensors=2)
    assert list(tensors) == ["t"]
