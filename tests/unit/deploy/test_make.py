"""`make demo` installs what the demo needs, and shows that it does; `make test` adds the tools."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from support.places import REPOSITORY

TOOLS = {
    "atheris",
    "hypothesis",
    "import-linter",
    "lycoris-lora",
    "mypy",
    "pytest",
    "ruff",
    "tensorrt-rtx-cu13",
    "vulture",
}


def packages(extra: str) -> set[str]:
    """Return the names that an extra asks for, through the extras of ours that it includes."""
    extras: dict[str, list[str]] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    names: set[str] = set()
    for line in extras[extra]:
        if ours := re.fullmatch(r"scumble\[(.+)\]", line):
            names = names.union(*(packages(further) for further in ours[1].split(",")))
        else:
            names.add(re.split(r"[^a-z0-9-]", line)[0])
    return names


def commands(target: str, venv: Path) -> list[str]:
    """Return what make would run in a clone without an environment."""
    done = subprocess.run(
        ["make", "-n", target, f"VENV={venv}"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_tools_are_in_an_extra_of_their_own() -> None:
    assert packages("demo") & TOOLS == set()
    assert {"torch", "diffusers", "onnxruntime", "peft"} <= packages("demo")
    assert packages("dev") >= TOOLS | packages("demo")


@pytest.mark.parametrize(("target", "extras"), [("demo", ["demo"]), ("serve", ["demo"]), ("test", ["demo", "dev"])])
def test_what_is_installed_for_a_target(tmp_path: Path, target: str, extras: list[str]) -> None:
    installs = [line for line in commands(target, tmp_path / "venv") if "pip install" in line]
    assert re.findall(r"\.\[(\w+)\]", "\n".join(installs)) == extras
    assert not any(" -q" in line for line in installs), "minutes of silence"
