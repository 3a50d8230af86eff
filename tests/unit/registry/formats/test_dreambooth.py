"""Checkpoints are kept as what differs from their base, and come back to the byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from scumble.errors import Incompatible, IntegrityError, NotFound, Refused
from scumble_registry import Registry, Status
from scumble_registry.compatibility import DreamboothCompatibility
from scumble_registry.extract import extract
from support.tiny_variant import make_checkpoint

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def tuned(tiny_base: Path, tmp_path: Path) -> Path:
    return make_checkpoint(tiny_base, tmp_path / "tuned", components=("unet", "vae"))


def same_folders(one: Path, other: Path) -> bool:
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file()) == names
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_it_comes_back_to_the_byte(registry: Registry, tiny_base: Path, tuned: Path, tmp_path: Path) -> None:
    registry.publish(tiny_base, "tiny/base")
    version = registry.publish(tuned, "my/dog", base="tiny/base")
    assert version.manifest.kind == "dreambooth"
    assert same_folders(tuned, registry.materialise(version))
    registry.pull("my/dog", tmp_path / "pulled")
    assert same_folders(tuned, tmp_path / "pulled")
    registry.verify()


def test_what_equals_the_base_is_not_kept_twice(registry: Registry, tiny_base: Path, tuned: Path) -> None:
    base = registry.publish(tiny_base, "tiny/base")
    version = registry.publish(tuned, "my/dog", base="tiny/base")
    assert isinstance(version.manifest.compatibility, DreamboothCompatibility)
    assert set(version.manifest.compatibility.changed) == {"unet", "vae"}
    text = "text_encoder/model.safetensors"
    assert version.manifest.files[text] == base.manifest.files[text]
    assert WEIGHTS not in version.manifest.files
    raw = (tuned / WEIGHTS).stat().st_size
    assert version.manifest.files[f"{WEIGHTS}.delta"].size < 0.6 * raw, "a third of the matrices changed"


def test_a_gentle_change_is_small(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    registry.publish(tiny_base, "tiny/base")
    gentle = make_checkpoint(tiny_base, tmp_path / "gentle", strength=1e-5)
    version = registry.publish(gentle, "my/gentle", base="tiny/base")
    strong = registry.publish(make_checkpoint(tiny_base, tmp_path / "strong"), "my/strong", base="tiny/base")
    delta = f"{WEIGHTS}.delta"
    assert version.manifest.files[delta].size < 0.6 * strong.manifest.files[delta].size


def test_other_spellings_and_types_come_back_too(registry: Registry, tiny_base: Path, tuned: Path) -> None:
    from safetensors.numpy import save_file

    path = tuned / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": values for name, values in load_file(path).items()}
    first = next(name for name in tensors if name.endswith("fc1.weight"))
    tensors[first] = tensors[first].astype(np.float16)
    save_file(tensors, path, {"format": "pt", "note": "kept"})
    registry.publish(tiny_base, "tiny/base")
    version = registry.publish(tuned, "my/dog", base="tiny/base")
    assert same_folders(tuned, registry.materialise(version))
    assert isinstance(version.manifest.compatibility, DreamboothCompatibility)
    assert version.manifest.compatibility.changed["text_encoder"] == tensors[first].size


def test_the_same_content_is_the_same_version(registry: Registry, tiny_base: Path, tuned: Path) -> None:
    registry.publish(tiny_base, "tiny/base")
    assert registry.publish(tuned, "my/dog", base="tiny/base") == registry.publish(tuned, "my/dog", base="tiny/base")


def test_without_a_base_it_is_a_base(registry: Registry, tuned: Path) -> None:
    assert registry.publish(tuned, "my/dog").manifest.kind == "base"


def test_what_the_bases_graphs_cannot_run_is_refused(
    registry: Registry, tiny_base: Path, make_tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    registry.publish(tiny_base, "tiny/base")
    wider = make_tiny_base(tmp_path / "wider", width=24)
    with pytest.raises(Incompatible, match="unet"):
        registry.publish(wider, "my/wider", base="tiny/base")
    with pytest.raises(Refused, match="no weight of this folder differs"):
        registry.publish(tiny_base, "my/same", base="tiny/base")
    assert registry.names() == ("tiny/base",)


def test_a_damaged_copy_is_made_again_and_a_damaged_delta_is_an_error(
    registry: Registry, tiny_base: Path, tuned: Path, home: Path
) -> None:
    registry.publish(tiny_base, "tiny/base")
    version = registry.publish(tuned, "my/dog", base="tiny/base")
    path = registry.materialise(version) / WEIGHTS
    path.chmod(0o644)
    path.write_bytes(b"x" * path.stat().st_size)
    assert same_folders(tuned, registry.materialise(version))
    blob = version.manifest.files[f"{WEIGHTS}.delta"]
    stored = next(home.rglob(blob.hex))
    stored.chmod(0o644)
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    shutil.rmtree(home / "cache")
    with pytest.raises(IntegrityError, match="delta"):
        registry.materialise(version)


def test_it_needs_its_base(registry: Registry, tiny_base: Path, tuned: Path) -> None:
    registry.publish(tiny_base, "tiny/base")
    version = registry.publish(tuned, "my/dog", base="tiny/base")
    registry.set_status("tiny/base@1", Status.QUARANTINED)
    with pytest.raises(Refused, match="quarantined"):
        registry.materialise(version)


def test_extraction_says_what_it_keeps(registry: Registry, tiny_base: Path, tuned: Path, tmp_path: Path) -> None:
    registry.publish(tiny_base, "tiny/base")
    registry.publish(tuned, "my/dog", base="tiny/base")
    kept = []
    for rank in (1, 4, 512):
        (work := tmp_path / str(rank)).mkdir()
        version = extract(registry, "my/dog", rank, f"my/rank{rank}", work)
        assert version.manifest.kind == "lora"
        kept.append(version.manifest.metrics["energy_kept"])
        assert version.manifest.metrics["not_expressed"], "the VAE takes no factors"
    assert kept == sorted(kept)
    assert kept[0] < 0.6
    assert kept[-1] == 1
    with pytest.raises(Refused, match="checkpoints"):
        extract(registry, "tiny/base", 4, "my/none", tmp_path)
    with pytest.raises(NotFound):
        extract(registry, "my/none", 4, "my/none", tmp_path)
