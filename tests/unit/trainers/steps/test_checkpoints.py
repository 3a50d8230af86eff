"""A checkpoint is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from scumble.errors import IntegrityError
from scumble_trainers.steps.checkpoints import latest_checkpoint, restore_parameters, write_checkpoint


def weight(value: float = 1.0) -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.full((2,), value))}


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, weight(5.0), {}, {"seconds": 1.5})
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state["seconds"]) == (3, 1.5)
    parameters = weight(0.0)
    restore_parameters(found, parameters)
    assert parameters["a"].tolist() == [5, 5]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, step, weight(), {}, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000015"]


def test_a_crash_while_writing_leaves_the_earlier_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, weight(), {}, {})

    def crash(_: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 10, weight(), {}, {}, extras=crash)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 5


def test_another_runs_parameters_and_a_damaged_state_are_refused(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    found = write_checkpoint(tmp_path, 5, weight(), {}, {})
    with pytest.raises(IntegrityError, match="other parameters"):
        restore_parameters(found, {"b": nn.Parameter(torch.zeros(2))})
    (found.folder / "state.json").write_text("{")
    with pytest.raises(IntegrityError, match="damaged"):
        latest_checkpoint(tmp_path)
