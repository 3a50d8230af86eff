from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from scumble.errors import InvalidRequest, Unavailable
from scumble_demo.emoji.command import prepare_style
from scumble_demo.emoji.packages import fetch_packages, required_packages


def install(folder: Path, package: str, version: str) -> None:
    place = folder / "node_modules" / package
    place.mkdir(parents=True)
    (place / "package.json").write_text(json.dumps({"version": version}))


def test_what_is_installed_at_the_pinned_version_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, version in required_packages().items():
        install(tmp_path, package, version)
    monkeypatch.setattr(shutil, "which", lambda _: pytest.fail("npm was looked for"))
    assert fetch_packages(tmp_path) == tmp_path / "node_modules"


def test_without_npm_the_error_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(Unavailable, match="npm is not installed"):
        fetch_packages(tmp_path)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="train, held-out or all"):
        prepare_style(tmp_path, split="half")
