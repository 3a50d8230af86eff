"""`scumble registry import`."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.commands import Scumble, as_json
from support.stand_ins import Hub, serving


def test_import_takes_what_publish_takes(
    scumble: Scumble, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({"ink.safetensors": lora.read_bytes()}, lfs={"ink.safetensors"})
    scumble("publish", base, "--name", "demo/base")
    options = ("--name", "styles/ink", "--base", "demo/base", "--trigger", "ink", "--alias", "prod", "--staged")
    with serving(hub) as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        version = as_json(scumble("import", "hf:ann/ink", *options, "--json"))
        assert scumble("import", "hf:ann/ink", "--name", "styles/oil", "--max-size", "10")[0] == 4
        assert scumble("import", "hf:ann/oil", "--name", "styles/oil")[0] == 3
    assert (version["ref"], version["status"]) == ("styles/ink@1", "staged")
    shown = as_json(scumble("show", "styles/ink@prod", "--json"))["manifest"]
    assert shown["provenance"]["source"]["commit"] == hub.commit
    assert shown["base"]
    assert scumble("import", "http://example.org/a", "--name", "styles/oil")[0] == 2
    assert scumble("import", "https://127.0.0.1:9/a", "--name", "styles/oil")[0] == 4
