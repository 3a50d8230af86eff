"""What is deployed is linted, and says what the server understands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from scumble.cli import main  # noqa: F401 - the command that the container runs is there
from scumble_build.engines import profiles
from scumble_server.cli.serve import serve
from support.places import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["scumble"]
    return found


@pytest.fixture(scope="module")
def options() -> set[str]:
    import typer

    app = typer.Typer()
    app.command()(serve)
    return {name for parameter in get_command(app).params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.skipif(HADOLINT is None, reason="hadolint has no wheel for this platform")
def test_the_dockerfile_passes_hadolint() -> None:
    done = subprocess.run([str(HADOLINT), DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_the_dockerfile_copies_is_there() -> None:
    sources = [name for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]]
    assert sources
    assert [name for name in sources if not (REPOSITORY / name).exists()] == []


def test_the_dockerfile_and_compose_start_the_server_with_options_that_it_has(
    service: dict[str, Any], options: set[str]
) -> None:
    words = re.search(r"^CMD (\[\"serve.*\])$", DOCKERFILE, re.MULTILINE)
    assert words is not None
    asked = re.findall(r"--[a-z-]+", words[1]) + [word.split("=")[0] for word in service["command"][1:]]
    assert service["command"][0] == "serve"
    assert set(asked) <= options


def test_compose_publishes_what_the_dockerfile_exposes_and_keeps_the_registry(service: dict[str, Any]) -> None:
    exposed = re.search(r"^EXPOSE (.+)$", DOCKERFILE, re.MULTILINE)
    assert exposed is not None
    assert [str(port["target"]) for port in service["ports"]] == exposed[1].split()
    assert {port["host_ip"] for port in service["ports"]} == {"${SCUMBLE_BIND:-127.0.0.1}"}
    assert service["volumes"] == ["data:/data"]
    assert service["build"] == {"context": "..", "dockerfile": "deploy/Dockerfile"}
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


@pytest.mark.parametrize("file", sorted((DEPLOY / "profiles").glob("*.toml")), ids=lambda file: file.stem)
def test_the_profiles_can_be_read(file: Path) -> None:
    assert profiles.read(file)
