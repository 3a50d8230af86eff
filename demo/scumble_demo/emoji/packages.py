"""Fetches the npm packages with the icons, at pinned versions, without running their scripts."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from scumble.errors import Unavailable
from scumble_demo.emoji.concepts import EXTRA_STYLES, STYLES

# English names of all emoji, for the tokenizer.
NAMES_PACKAGE, NAMES_VERSION = "unicode-emoji-json", "0.9.0"


def required_packages() -> dict[str, str]:
    """Package name → pinned version."""
    return {style.package: style.version for style in (*STYLES, *EXTRA_STYLES)} | {NAMES_PACKAGE: NAMES_VERSION}


def installed_version(folder: Path, package: str) -> str | None:
    manifest = folder / "node_modules" / package / "package.json"
    if not manifest.is_file():
        return None
    return str(json.loads(manifest.read_text(encoding="utf-8"))["version"])


def fetch_packages(folder: Path) -> Path:
    """Install all packages into `folder/node_modules`, unless they are there already.

    Raises Unavailable if npm is missing or fails, for example without network.
    """
    wanted = required_packages()
    missing = [f"{name}@{v}" for name, v in wanted.items() if installed_version(folder, name) != v]
    if missing:
        _install(folder, missing)
    return folder / "node_modules"


def _install(folder: Path, packages: list[str]) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable(
            "npm is not installed; it fetches the emoji pictures. Install Node.js, which includes it", needs="npm"
        )
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run([*command, *packages], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(f"npm could not fetch {', '.join(packages)}:\n{done.stderr[-2000:]}", needs="network")
