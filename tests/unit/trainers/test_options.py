"""The command line and --config: one option a field, the command line wins, nothing unknown is swallowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from scumble.errors import InvalidRequest, NotFound
from scumble_trainers import command
from scumble_trainers.cli import app
from scumble_trainers.methods import METHODS
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.settings import option_name


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The settings that a command line would train with."""
    told: list[Any] = []
    monkeypatch.setattr(command, "train_and_publish", lambda _entry, _common, settings: told.append(settings))

    def parse(*arguments: str) -> LoraSettings:
        given = ["lora", "--base", "b", "--data", "d", "--out", str(tmp_path), *arguments]
        result = CliRunner().invoke(app, given, catch_exceptions=False, standalone_mode=False)
        if result.exception:
            raise result.exception
        assert isinstance(told[-1], LoraSettings)
        return told[-1]

    return parse


def write(folder: Path, text: str) -> str:
    (folder / "run.toml").write_text(text)
    return str(folder / "run.toml")


def test_every_field_can_be_given_in_a_file(settings_of: Any, tmp_path: Path) -> None:
    config = write(
        tmp_path,
        'steps = 7\nbatch-size = 2\nlearning_rate = 1e-3\ntrigger = ["ink style"]\nprompt = ["a", "b"]\nbucket = true\n'
        '[rank-pattern]\n"attn2.*" = 4\n',
    )
    found = settings_of("--config", config)
    assert (found.steps, found.batch_size, found.learning_rate, found.bucket) == (7, 2, 1e-3, True)
    assert (found.trigger_words, found.prompts, found.rank_pattern) == (("ink style",), ("a", "b"), {"attn2.*": 4})


def test_the_command_line_wins_even_with_a_default(settings_of: Any, tmp_path: Path) -> None:
    config = write(tmp_path, 'steps = 7\nrank = 4\nbucket = true\nprompt = ["a"]\n')
    found = settings_of("--config", config, "--rank", "8", "--no-bucket", "--prompt", "b", "--prompt", "c")
    assert (found.steps, found.rank, found.bucket, found.prompts) == (7, 8, False, ("b", "c"))


def test_repeated_patterns_keep_their_order(settings_of: Any) -> None:
    patterns = ["--rank-pattern", "attn2.*=4", "--rank-pattern", "to_(q|k)=2", "--alpha-pattern", "a=b=1.5"]
    found = settings_of("--steps", "1", *patterns)
    assert list(found.rank_pattern.items()) == [("attn2.*", 4), ("to_(q|k)", 2)]
    assert found.alpha_pattern == {"a=b": 1.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--steps: Field required"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "1", "--rank-pattern", "attn2"], "--rank-pattern attn2: write PATTERN=VALUE"),
        (["--steps", "1", "--rank-pattern", "attn2=many"], "--rank-pattern"),
        (["--steps", "1", "--rank-pattern", "attn2=0"], "--rank-pattern"),
        (["--steps", "1", "--ema", "1"], "--ema 1"),
    ],
)
def test_what_is_wrong_is_named_as_on_the_command_line(settings_of: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        settings_of(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps = 1", '"stepps", which is no option; there are .*batch-size'),
        ('base = "b"', '"base", which is no option'),
        ('steps = "many"', "--steps many"),
        ("steps = ", "cannot be read as TOML"),
    ],
)
def test_a_bad_file_is_refused(settings_of: Any, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        settings_of("--config", write(tmp_path, text))


def test_a_missing_file_is_not_found(settings_of: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no configuration file .*none\.toml"):
        settings_of("--config", str(tmp_path / "none.toml"))


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_help_has_every_option_with_dashes(entry: Any) -> None:
    told = CliRunner().invoke(app, [entry.command, "--help"], env={"COLUMNS": "400", "NO_COLOR": "1"}).stdout
    for field in entry.settings.model_fields:
        name = option_name(entry.settings, field)
        assert "_" not in name
        assert name in told


def test_a_run_of_before_an_option_was_there_had_its_default() -> None:
    now = LoraSettings(steps=3)
    earlier = {name: value for name, value in now.config().items() if name not in {"dora", "rank_pattern", "prompts"}}
    assert now.differences(earlier) == []
    assert LoraSettings(steps=3, dora=True).differences(earlier) == ["dora: False → True"]
