"""What `inspect` says is what publishing would do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scumble.errors import NotFound, Refused
from scumble_registry import Registry, formats
from scumble_registry.compatibility import BaseCompatibility
from scumble_registry.formats.source import Draft, Source
from scumble_registry.inspection import inspect
from scumble_registry.manifest import Sampling

LoraWriter = Callable[..., Path]


def test_everything_that_publishing_derives_is_told_before(registry: Registry, write_lora: LoraWriter) -> None:
    file = write_lora(metadata={"trigger_words": '["ink"]', "ss_network_dim": "2"})
    told = inspect(file, registry)
    assert registry.names() == ()
    version = registry.publish(file, "styles/ink")
    manifest = version.manifest
    assert manifest.record is not None
    assert (told.kind, told.compatibility, told.record) == ("lora", manifest.compatibility, manifest.record.digest)
    assert told.trigger_words == manifest.trigger_words == ("ink",)
    assert told.hashes == frozenset(registry.hashes(version))
    assert told.training["ss_network_dim"] == "2" == manifest.training["ss_network_dim"]


def test_it_says_which_versions_have_the_same_content(registry: Registry, write_lora: LoraWriter) -> None:
    file = write_lora("a.safetensors")
    assert inspect(file, registry).known == ()
    registry.publish(file, "styles/ink")
    again = inspect(write_lora("b.safetensors", metadata={"ss_epoch": "3"}), registry)
    assert {(match.version.ref, match.kind) for match in again.known} == {
        ("styles/ink@1", "record"),
        ("styles/ink@1", "tensors"),
    }


def test_it_needs_no_registry(lora: Path, base: Path) -> None:
    told = inspect(lora, base=str(base)).to_dict()
    assert told["base"] == {"ref": str(base), "fits": True, "why_not": None}
    assert told["sha256"] == hashlib.sha256(lora.read_bytes()).hexdigest()
    assert told["autov2"] == told["sha256"][:10]
    json.dumps(told)


def test_a_base_that_does_not_fit_is_told(registry: Registry, write_lora: LoraWriter, base: Path) -> None:
    registry.publish(base, "demo/base")
    odd = write_lora(
        tensors={
            "unet.conv_out.lora_A.weight": np.ones((1, 4), np.float32),
            "unet.conv_out.lora_B.weight": np.ones((4, 1), np.float32),
        }
    )
    told = inspect(odd, registry, base="demo/base")
    assert told.misfit is not None
    assert "unet.conv_out" in told.misfit


def test_a_base_by_reference_needs_a_registry_and_must_be_a_base(registry: Registry, lora: Path) -> None:
    with pytest.raises(Refused, match="no registry"):
        inspect(lora, base="demo/base")
    with pytest.raises(NotFound):
        inspect(lora, registry, base="demo/base")
    registry.publish(lora, "styles/ink")
    with pytest.raises(Refused, match="not a base"):
        inspect(lora, registry, base="styles/ink")
    with pytest.raises(Refused, match="not a base"):
        inspect(lora, registry, base=str(lora.parent / make_folder_of(lora)))


def make_folder_of(lora: Path) -> str:
    folder = lora.parent / "folder"
    folder.mkdir()
    (folder / lora.name).write_bytes(lora.read_bytes())
    return "folder"


def test_errors_are_those_of_publishing(registry: Registry, write_lora: LoraWriter, tmp_path: Path) -> None:
    bad = write_lora(tensors={"unet.conv_in.lora_A.weight": np.full((1, 4), np.nan, np.float32)})
    with pytest.raises(Refused) as published:
        registry.publish(bad, "styles/ink")
    with pytest.raises(Refused) as told:
        inspect(bad)
    assert told.value.message == published.value.message
    with pytest.raises(NotFound):
        inspect(tmp_path / "nothing")


def test_files_larger_than_allowed_are_refused_before_they_are_read(registry: Registry, tmp_path: Path) -> None:
    large = tmp_path / "large.safetensors"
    large.write_bytes(b"x" * 1000)
    for look in (lambda: inspect(large, max_bytes=999), lambda: registry.publish(large, "a/b", max_bytes=999)):
        with pytest.raises(Refused, match="--max-size"):
            look()


def test_what_a_format_tells_goes_into_the_manifest(
    registry: Registry, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of a format that leaves two keys out and knows how its file is to be sampled."""
    read = formats.format_of("lora").read

    def tells(source: Source, base: BaseCompatibility | None) -> Draft:
        if not source.allow_leftover:
            raise Refused("2 keys are not understood")
        draft = read(source, base)
        return replace(draft, dialect="odd", leftover=("a.b", "a.c"), sampling=Sampling(scheduler="lcm", steps=4))

    told = tuple(replace(form, read=tells) if form.kind == "lora" else form for form in formats.FORMATS)
    monkeypatch.setattr(formats, "FORMATS", told)
    with pytest.raises(Refused, match="not understood"):
        registry.publish(lora, "a/b")
    told = inspect(lora)
    manifest = registry.publish(lora, "a/b", allow_leftover=True).manifest
    assert (manifest.dialect, manifest.leftover, manifest.sampling) == (told.dialect, told.leftover, told.sampling)
    assert manifest.leftover == ("a.b", "a.c")
    own = registry.publish(lora, "a/b", allow_leftover=True, sampling={"steps": 8}).manifest
    assert own.sampling == Sampling(steps=8)
