"""A pickle is read in a process of its own, with bounded memory."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scumble.errors import Refused
from scumble_registry.formats.pickled import Placeholder, process, to_safetensors
from support.hostile_pickles import CANARY, hostile, sound
from support.pickled_reading import check

SOUND = sound()


HOSTILE = hostile()


LIMIT = 1 << 30


FEW = [
    "REDUCE of posix.system, zipped",
    "STACK_GLOBAL",
    "deflated bomb",
    "expanded view",
    "25 000 empty tensors",
    "deep lists",
    "memo bomb",
    "huge LONG4",
    "two million opcodes",
]


@pytest.mark.parametrize("name", FEW)
def test_the_process_refuses_it_too_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, says = HOSTILE[name]
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(Refused, match=f"a.pt is a pickle, of which nothing was executed, and has .*{re.escape(says)}"):
        to_safetensors(tmp_path / "a.pt", tmp_path / "b.safetensors", LIMIT)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"], CANARY


def test_a_checkpoint_with_callbacks_comes_through_the_process(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(SOUND["checkpoint"])
    tree = to_safetensors(tmp_path / "a.pt", tmp_path / "b.safetensors", LIMIT)
    assert isinstance(tree, dict)
    assert isinstance(tree["callbacks"], dict)
    assert tree["callbacks"]["other"] == Placeholder("support.hostile_pickles.Callback")
    check(tree, torch.load(BytesIO(SOUND["checkpoint"]), weights_only=False), load_file(tmp_path / "b.safetensors"))


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(SOUND["list"])
    with pytest.raises(Refused, match="larger than 100 bytes"):
        to_safetensors(tmp_path / "a.pt", tmp_path / "b.safetensors", 100)


def test_the_reader_gets_less_than_512_mb_beside_the_file() -> None:
    assert process._MEMORY < 512 << 20  # of address space: the kernel holds it to that
