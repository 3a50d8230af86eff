"""Exported and published again, a version has the same record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from scumble.errors import InvalidRequest, NotFound, Refused
from scumble_registry import Registry
from scumble_registry.exporting import export

LoraWriter = Callable[..., Path]


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft", "webui"])
def test_a_lora_comes_back_from_every_layout(
    registry: Registry, base: Path, write_lora: LoraWriter, layout: str, tmp_path: Path
) -> None:
    registry.publish(base, "demo/base")
    first = registry.publish(
        write_lora(metadata={"ss_epoch": "3"}), "styles/ink", base="demo/base", trigger_words="ink"
    )
    export(registry, "styles/ink", layout, tmp_path / "out")
    again = registry.publish(tmp_path / "out", "again/ink", base="demo/base")
    assert again.manifest.record == first.manifest.record
    assert again.manifest.trigger_words == ("ink",)
    for file in (tmp_path / "out").rglob("*.safetensors"):
        with safe_open(file, "np") as opened:
            assert opened.metadata()["ss_epoch"] == "3"


def test_whole_models_come_back_as_they_were(
    registry: Registry, base: Path, write_base: Callable[..., Path], tmp_path: Path
) -> None:
    first = registry.publish(base, "demo/base")
    registry.publish(write_base("tuned", seed=1), "demo/tuned", base="demo/base")
    for ref in ("demo/base", "demo/tuned"):
        export(registry, ref, "diffusers", tmp_path / ref)
    assert registry.publish(tmp_path / "demo/base", "again/base").digest == first.digest
    tuned = registry.publish(tmp_path / "demo/tuned", "again/tuned", base="demo/base")
    assert tuned.digest == registry.resolve("demo/tuned").digest


def test_a_layout_that_a_kind_has_not_is_an_invalid_request_that_names_those_it_has(
    registry: Registry, base: Path, lora: Path, tmp_path: Path
) -> None:
    registry.publish(base, "demo/base")
    registry.publish(lora, "styles/ink")
    with pytest.raises(InvalidRequest, match="a base cannot be exported as 'kohya'; it can be as diffusers"):
        export(registry, "demo/base", "kohya", tmp_path / "out")
    with pytest.raises(InvalidRequest, match="base"):
        export(registry, "styles/ink", "kohya", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(registry, "styles/ink", "kohya", tmp_path / "out", base="demo/base")


def test_nothing_is_overwritten_and_nothing_quarantined_leaves(registry: Registry, lora: Path, tmp_path: Path) -> None:
    registry.publish(lora, "styles/ink")
    with pytest.raises(Refused, match="not an empty folder"):
        export(registry, "styles/ink", "peft", lora.parent)
    with pytest.raises(NotFound):
        export(registry, "styles/oil", "peft", tmp_path / "out")
    registry.set_status("styles/ink@1", "quarantined")
    with pytest.raises(Refused, match="quarantined"):
        export(registry, "styles/ink@1", "peft", tmp_path / "out")
