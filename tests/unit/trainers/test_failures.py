"""What goes wrong in the middle: a typed error, the last checkpoint as it was, and nothing published."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from scumble.errors import Incompatible, IntegrityError, Refused, Unavailable
from scumble_registry import Registry
from scumble_trainers.cli import app
from scumble_trainers.methods.lora.files import FILE
from scumble_trainers.steps import loop

SMALL = ["--steps", "4", "--batch-size", "2", "--rank", "4", "--sample-steps", "1", "--checkpoint-every", "2"]


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """The kernel itself refuses to write on, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCUMBLE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def command(base: Path, data: Path, out: Path) -> None:
    arguments = ["lora", "--base", str(base), "--data", str(data), "--out", str(out), "--publish", "a/b", *SMALL]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=False)
    if result.exception:
        raise result.exception


def nothing_is_published(home: Path) -> bool:
    with Registry.open(home, create=True) as registry:
        return not registry.names()


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.pt"])
def test_without_room_for_a_checkpoint_the_earlier_one_is_gone_on_from(
    base_folder: Path, make_data: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    data, out = make_data(4), tmp_path / "out"
    write = loop.write_checkpoint

    def full_at_step_4(folder: Path, step: int, *rest: Any, **more: Any) -> Any:
        if step < 4:
            return write(folder, step, *rest, **more)
        with no_file_longer_than((folder / "step-000002" / file).stat().st_size // 2):
            return write(folder, step, *rest, **more)

    monkeypatch.setattr(loop, "write_checkpoint", full_at_step_4)
    with pytest.raises(Unavailable, match=f"cannot write {out}.*check space"):
        command(base_folder, data, out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    assert not (out / "training.json").exists()
    assert nothing_is_published(home)

    monkeypatch.undo()
    monkeypatch.setenv("SCUMBLE_HOME", str(home))
    command(base_folder, data, out)
    command(base_folder, data, tmp_path / "whole")
    assert (out / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    assert not nothing_is_published(home)


def test_without_room_for_latents_nothing_is_left_of_them(
    base_folder: Path, make_data: Any, home: Path, tmp_path: Path
) -> None:
    data, out = make_data(8), tmp_path / "out"
    with no_file_longer_than(4096), pytest.raises(Unavailable, match="check space"):
        command(base_folder, data, out)
    assert list((out / "cache").iterdir()) == []
    assert nothing_is_published(home)


def test_a_loss_that_is_not_finite_is_refused_with_what_to_do(
    base_folder: Path, make_data: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = make_data(4), tmp_path / "out"
    draw = loop.draw_step

    def overflow_at_step_4(seed: int, step: int, **more: Any) -> Any:
        drawn = draw(seed, step, **more)
        if step == 3:
            drawn.noise.fill_(torch.inf)
        return drawn

    monkeypatch.setattr(loop, "draw_step", overflow_at_step_4)
    with pytest.raises(Refused, match="loss of step 4 is not finite: use a lower --learning-rate"):
        command(base_folder, data, out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    assert nothing_is_published(home)


@pytest.mark.usefixtures("home")
def test_a_damaged_checkpoint_is_named(base_folder: Path, make_data: Any, tmp_path: Path) -> None:
    data, out = make_data(4), tmp_path / "out"
    command(base_folder, data, out)
    (out / "training.json").unlink()
    (out / "checkpoints/step-000004/state.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"step-000004 is damaged .*delete it"):
        command(base_folder, data, out)


@pytest.mark.usefixtures("home")
def test_a_base_that_cannot_be_trained_for_is_refused_before_any_work(
    base_folder: Path, make_data: Any, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(base_folder, base)
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "sample"}))
    with pytest.raises(Incompatible, match="prediction type 'sample'"):
        command(base, make_data(4), out)
    assert not out.exists()
