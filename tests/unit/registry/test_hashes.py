"""A file found elsewhere finds its version here."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sqlalchemy import text

from scumble.errors import InvalidRequest, NotFound
from scumble_registry import Registry, Status
from scumble_registry.hashes import HashKind, parse_prefix
from scumble_registry.store.database import Database
from scumble_registry.store.paths import HomePaths

LoraWriter = Callable[..., Path]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def additional_networks_hash(file: Path) -> str:
    """What kohya's trainer writes as `sshs_model_hash`: all bytes behind the header."""
    data = file.read_bytes()
    return hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()


def refs(registry: Registry, prefix: str) -> list[str]:
    return [match.version.ref for match in registry.find_hash(prefix)]


def test_a_version_is_found_by_its_file_its_tensors_its_record_and_its_digest(registry: Registry, lora: Path) -> None:
    version = registry.publish(lora, "styles/ink")
    record = version.manifest.record
    assert record is not None
    for found, kind in (
        (sha256(lora), HashKind.FILE),
        (additional_networks_hash(lora), HashKind.TENSORS),
        (record.hex, HashKind.RECORD),
        (version.digest, None),
    ):
        (match,) = registry.find_hash(found)
        assert (match.version, match.kind) == (version, kind)


@pytest.mark.parametrize("spelling", [str.lower, str.upper, "sha256:{}".format])
def test_auto_v2_and_auto_v3_are_found_in_any_spelling(
    registry: Registry, lora: Path, spelling: Callable[[str], str]
) -> None:
    registry.publish(lora, "styles/ink")
    assert refs(registry, spelling(sha256(lora)[:10])) == ["styles/ink@1"]
    assert refs(registry, spelling(additional_networks_hash(lora)[:12])) == ["styles/ink@1"]


def test_edited_metadata_changes_the_file_and_not_the_tensors(registry: Registry, write_lora: LoraWriter) -> None:
    registry.publish(write_lora("a.safetensors"), "styles/ink")
    edited = write_lora("b.safetensors", metadata={"ss_output_name": "ink"})
    registry.publish(edited, "styles/ink")
    assert refs(registry, sha256(edited)) == ["styles/ink@2"]
    assert refs(registry, additional_networks_hash(edited)) == ["styles/ink@1", "styles/ink@2"]


def test_a_quarantined_version_is_found_and_says_so(registry: Registry, lora: Path) -> None:
    registry.publish(lora, "styles/ink")
    registry.set_status("styles/ink@1", Status.QUARANTINED)
    assert [match.version.status for match in registry.find_hash(sha256(lora))] == [Status.QUARANTINED]


def test_files_of_a_base_and_of_a_checkpoint_are_found_as_they_were(
    registry: Registry, base: Path, write_base: Callable[..., Path]
) -> None:
    tuned = write_base("tuned", seed=1)
    registry.publish(base, "demo/base")
    registry.publish(tuned, "demo/tuned", base="demo/base")
    name = "unet/diffusion_pytorch_model.safetensors"
    assert refs(registry, sha256(base / name)) == ["demo/base@1"]
    assert refs(registry, sha256(tuned / name)) == ["demo/tuned@1"]


@pytest.mark.parametrize("text", ["", "abc1234", "g" * 10, "a" * 65, "é" * 10, "sha256:"])
def test_what_is_no_hash_is_an_invalid_request(text: str) -> None:
    with pytest.raises(InvalidRequest, match="8 to 64"):
        parse_prefix(text)


def test_a_hash_of_nothing_here_is_not_found(registry: Registry, lora: Path) -> None:
    registry.publish(lora, "styles/ink")
    with pytest.raises(NotFound, match="0000000000"):
        registry.find_hash("0000000000")


def test_publishing_again_and_many_at_once_notes_each_hash_once(registry: Registry, lora: Path) -> None:
    threads = [threading.Thread(target=registry.publish, args=(lora, "styles/ink")) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registry.hashes(registry.find("styles/ink@1"))) == 3


def test_a_registry_from_before_there_were_hashes_finds_its_files(
    home: Path, base: Path, write_base: Callable[..., Path], lora: Path
) -> None:
    tuned = write_base("tuned", seed=1)
    with Registry.open(home, create=True) as registry:
        registry.publish(base, "demo/base")
        registry.publish(tuned, "demo/tuned", base="demo/base")
        before = registry.publish(lora, "styles/ink", base="demo/base")
    make_old(home)
    with Registry.open(home) as registry:
        assert registry.find("styles/ink@1") == before
        assert refs(registry, sha256(lora)[:10]) == ["styles/ink@1"]
        assert refs(registry, additional_networks_hash(lora)[:12]) == ["styles/ink@1"]
        assert refs(registry, sha256(tuned / "unet/diffusion_pytorch_model.safetensors")) == ["demo/tuned@1"]
        assert registry.hash_older() == 0


def make_old(home: Path) -> None:
    """The schema that the first release had, with what is in it."""
    database = Database(HomePaths(home))
    with database.writing() as connection:
        connection.execute(text("DROP TABLE artifacts"))
        connection.execute(text("DROP TABLE hashes"))
        connection.execute(text("ALTER TABLE versions DROP COLUMN hashed"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    database.close()


def test_many_that_open_an_old_registry_at_once_migrate_it_once(home: Path, lora: Path) -> None:
    with Registry.open(home, create=True) as registry:
        registry.publish(lora, "styles/ink")
    make_old(home)
    found: list[list[str]] = []

    def look() -> None:
        with Registry.open(home) as registry:
            found.append(refs(registry, additional_networks_hash(lora)))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["styles/ink@1"]] * 4


def test_one_damaged_version_hides_no_other(home: Path, write_lora: LoraWriter) -> None:
    with Registry.open(home, create=True) as registry:
        for seed in range(2):
            registry.publish(write_lora(f"{seed}.safetensors", seed=seed), "styles/ink")
        blob = next(iter(registry.find("styles/ink@1").manifest.files.values()))
    make_old(home)
    (home / "registry/blobs/sha256" / blob.hex[:2] / blob.hex).unlink()
    second = write_lora("again.safetensors", seed=1)
    with Registry.open(home) as registry:
        assert refs(registry, additional_networks_hash(second)) == ["styles/ink@2"]


def test_hashes_are_those_that_a_webui_shows(registry: Registry, tmp_path: Path) -> None:
    """AutoV2 and AutoV3 of a file written out by hand."""
    header = json.dumps(
        {
            "unet.conv_in.lora_A.weight": {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]},
            "unet.conv_in.lora_B.weight": {"dtype": "F32", "shape": [4, 1], "data_offsets": [16, 32]},
        }
    ).encode()
    data = np.ones(8, np.float32).tobytes()
    file = tmp_path / "ones.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    registry.publish(file, "a/ones")
    assert refs(registry, hashlib.sha256(file.read_bytes()).hexdigest()[:10]) == ["a/ones@1"]
    assert refs(registry, hashlib.sha256(data).hexdigest()[:12]) == ["a/ones@1"]


def test_a_pickle_is_found_by_the_hash_that_it_had_before_its_conversion(registry: Registry, tmp_path: Path) -> None:
    vectors = torch.randn(2, 768)
    torch.save({"string_to_param": {"*": vectors}, "name": "ink", "step": 3}, tmp_path / "ink.pt")
    save_file({"emb_params": vectors}, tmp_path / "ink.safetensors")
    pickled = registry.publish(tmp_path / "ink.pt", "word/pickled")
    plain = registry.publish(tmp_path / "ink.safetensors", "word/plain")
    assert refs(registry, sha256(tmp_path / "ink.pt")[:10]) == ["word/pickled@1"]
    assert pickled.manifest.record is not None
    assert pickled.manifest.record == plain.manifest.record
    assert refs(registry, pickled.manifest.record.hex) == ["word/pickled@1", "word/plain@1"]
    assert pickled.manifest.dialect == "webui"


def test_two_files_of_one_content_are_one_version_known_by_both(registry: Registry, tmp_path: Path) -> None:
    """What a pickle held beside its vectors is not kept: the files that are stored are the same."""
    vectors = torch.ones(2, 768)
    for step in (1, 2):
        (tmp_path / str(step)).mkdir()
        torch.save({"string_to_param": {"*": vectors}, "name": "ink", "step": step}, tmp_path / f"{step}/ink.pt")
    first, second = (registry.publish(tmp_path / f"{step}/ink.pt", "word/ink") for step in (1, 2))
    assert first == second
    assert all(refs(registry, sha256(tmp_path / f"{step}/ink.pt")) == ["word/ink@1"] for step in (1, 2))
