"""The command line: one entry point is loaded, every error has its exit status, and `--json` is for programs."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer

from scumble import cli
from scumble.errors import Incompatible, IntegrityError, InvalidRequest, NotFound, Unavailable

nested = typer.Typer()


@nested.command()
def greet(name: str) -> None:
    print(f"hello {name}")


def raises(kind: str) -> None:
    """Raise an error of ours."""
    errors = (InvalidRequest, NotFound, Incompatible, IntegrityError, Unavailable)
    raise {error.code: error for error in errors}[kind](f"it was {kind}", where="here")


def with_json(*, as_json: bool = typer.Option(False, "--json")) -> None:
    raise NotFound(f"nothing, {as_json}", where=Path("here"))


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    here = __name__
    entries = [
        EntryPoint(name, value, cli.GROUP)
        for name, value in {
            "nested": f"{here}:nested",
            "raises": f"{here}:raises",
            "with-json": f"{here}:with_json",
            "interrupted": f"{here}:interrupted",
            "needs-torch": "scumble_trainers_that_are:broken",
            "train": "scumble_trainers:nothing",
        }.items()
    ]
    monkeypatch.setattr(cli, "entry_points", lambda **_: entries)


def run(*arguments: str) -> int:
    try:
        return cli.run([*arguments])
    except SystemExit as exit_:
        return int(exit_.code or 0)


def test_a_command_may_be_an_app_or_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("nested", "greet", "you") == 0
    assert capsys.readouterr().out == "hello you\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [("invalid_request", 2), ("not_found", 3), ("incompatible", 4), ("integrity", 5), ("unavailable", 6)],
)
def test_an_error_is_one_line_on_stderr_and_its_exit_status(
    capsys: pytest.CaptureFixture[str], code: str, status: int
) -> None:
    assert run("raises", code) == status
    assert capsys.readouterr() == ("", f"scumble: it was {code}\n")


def test_json_gets_the_error_as_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("with-json", "--json") == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == {"code": "not_found", "message": "nothing, True", "fields": {"where": "here"}}


@pytest.mark.parametrize("arguments", [["no-such-command"], ["raises"], ["raises", "--no-such-option"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert run(*arguments) == 2


def test_an_interrupt_exits_130() -> None:
    assert run("interrupted") == 130


def test_help_lists_every_command_and_loads_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("nested", "needs-torch", "train"))


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("scumble 0.")


def test_a_missing_package_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: EntryPoint) -> None:
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    monkeypatch.setattr(EntryPoint, "load", load)
    assert run("train") == Unavailable.exit_status
    assert "pip install 'scumble[trainers]'" in capsys.readouterr().err


def test_a_missing_module_of_our_own_is_a_bug_and_stays_one() -> None:
    with pytest.raises(ModuleNotFoundError):
        run("needs-torch")


def complete(*words: str) -> list[str]:
    """What bash offers for the last word, as `scumble --show-completion bash` asks for it."""
    environment = {
        **os.environ,
        "_SCUMBLE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "import sys; from scumble.cli import main; sys.argv = ['scumble']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    return done.stdout.split()


def test_a_shell_completes_commands_and_the_options_of_the_one_that_is_typed() -> None:
    assert complete("scumble", "gen") == ["generate"]
    assert {"--adapter", "--seed"} <= set(complete("scumble", "generate", "--"))
    assert {"publish", "ls"} <= set(complete("scumble", "registry", ""))


def test_the_script_for_a_shell_can_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "--install-completion" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["scumble.errors", "scumble.cli"])
def test_the_small_parts_load_neither_grpc_nor_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'grpc', 'numpy', 'torch', 'tritonclient'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_can_be_imported_and_is_listed() -> None:
    import scumble

    assert set(scumble.__all__) <= set(dir(scumble))
    assert all(getattr(scumble, name) for name in scumble.__all__)
    with pytest.raises(AttributeError):
        scumble.nothing  # noqa: B018
