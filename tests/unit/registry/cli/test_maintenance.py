"""Commands that keep a registry whole: gc, fsck, verify."""

from __future__ import annotations

import io
import json
from pathlib import Path

from scumble_registry import Registry
from scumble_registry.store.blobs import FileStore
from support.commands import Scumble, as_json


def test_damage_exits_with_5_and_names_what_is_damaged(scumble: Scumble, home: Path, lora: Path) -> None:
    scumble("publish", lora, "--name", "styles/ink")
    with Registry.open(home) as registry:
        record = registry.resolve("styles/ink").manifest.record
    assert record is not None
    path = FileStore(home / "registry").path(record)
    path.unlink()
    path.write_bytes(b"damage")
    status, _, err = scumble("verify")
    assert (status, "(record) of styles/ink@1" in err) == (5, True)


def test_gc_and_fsck_say_what_they_found(scumble: Scumble, home: Path, lora: Path) -> None:
    scumble("publish", lora, "--name", "styles/ink")
    FileStore(home / "registry").put(io.BytesIO(b"left behind"))
    assert as_json(scumble("fsck", "--json"))["unneeded"] == 1
    assert "1 unneeded blobs" in scumble("fsck")[1]
    assert as_json(scumble("gc", "--grace", "0", "--dry-run", "--json"))["blobs"] == 1
    assert scumble("gc", "--grace", "0")[1].startswith("1 blobs, 0 entries of the cache, 0 unfinished: 11 bytes freed")
    assert "complete\n" in scumble("fsck")[1]
    for file in (home / "registry/blobs/sha256").glob("??/*"):
        file.unlink()
    status, out, _ = scumble("fsck", "--json")
    assert (status, len(json.loads(out)["error"]["fields"]["damaged"])) == (5, 2)
