"""What a file is, its content says; what is stored is safetensors."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from scumble.errors import Refused
from scumble_registry import Registry
from scumble_registry.formats.incoming import safetensors_name, with_safetensors
from scumble_registry.formats.pickled import Leaf
from scumble_registry.formats.safetensors_header import read_header
from scumble_registry.formats.source import Source
from support.hostile_pickles import CALLS, CANARY, saved

VECTOR = torch.arange(8.0)


def incoming(path: Path, work: Path) -> Source:
    return with_safetensors(replace(Source.scan(path), work=work))


@pytest.mark.parametrize("name", ["ink.bin", "ink.pt", "ink.safetensors", "ink"])
def test_a_pickle_is_converted_whatever_it_is_called(registry: Registry, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(saved({"<ink>": VECTOR}))
    version = registry.publish(tmp_path / name, "e/ink")
    folder = registry.materialise(version)
    assert [file.name for file in folder.iterdir()] == ["learned_embeds.safetensors"]
    assert torch.equal(load_file(folder / "learned_embeds.safetensors")["<ink>"], VECTOR)


def test_safetensors_is_safetensors_whatever_it_is_called(registry: Registry, tmp_path: Path) -> None:
    save_file({"<ink>": VECTOR}, tmp_path / "ink.safetensors")
    save_file({"<ink>": VECTOR}, tmp_path / "ink.bin")
    right = registry.publish(tmp_path / "ink.safetensors", "e/ink")
    assert registry.publish(tmp_path / "ink.bin", "e/ink").digest == right.digest
    (tmp_path / "folder").mkdir()
    (tmp_path / "ink.bin").rename(tmp_path / "folder/ink.pt")
    assert list(registry.publish(tmp_path / "folder", "e/two").manifest.files) == ["ink.safetensors"]


def test_what_a_pickle_held_beside_tensors_is_kept_for_formats(tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/sub/net.pt").write_bytes(saved({320: ({"linear.0.weight": VECTOR},), "step": 3}))
    (tmp_path / "in/README.md").write_text("words")
    source = incoming(tmp_path / "in", tmp_path / "work")
    assert list(source.files) == ["README.md", "sub/net.safetensors"]
    assert source.plain == {
        "sub/net.safetensors": {320: ({"linear.0.weight": Leaf("320.0.linear.0.weight")},), "step": 3}
    }
    assert torch.equal(load_file(source.files["sub/net.safetensors"])["320.0.linear.0.weight"], VECTOR)
    assert source.files["sub/net.safetensors"].is_relative_to(tmp_path / "work")


def test_a_tensor_alone_has_a_name_of_ours(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(saved(VECTOR))
    source = incoming(tmp_path / "a.pt", tmp_path / "work")
    assert source.plain == {"a.safetensors": Leaf("tensor")}


@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        ("a.pt", "a.safetensors"),
        ("a/b.CKPT", "a/b.safetensors"),
        ("easy.negative.bin", "easy.negative.safetensors"),
        ("style-v1.5", "style-v1.5.safetensors"),
        ("a.safetensors", "a.safetensors"),
    ],
)
def test_only_the_endings_of_weights_are_replaced(name: str, becomes: str) -> None:
    assert safetensors_name(name) == becomes


def test_two_files_that_would_have_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("model.bin", "model.ckpt"):
        (tmp_path / name).write_bytes(saved({"a": VECTOR}))
    with pytest.raises(Refused, match=r"model.ckpt would become model.safetensors, which exists too"):
        incoming(tmp_path, tmp_path / "work")


def test_a_file_that_is_two_things_is_read_as_what_it_begins_with(tmp_path: Path) -> None:
    """torch and zip tools look at different ends of a file."""
    zip_inside = torch.frombuffer(bytearray(saved({"t": VECTOR})), dtype=torch.uint8)
    save_file({"<ink>": zip_inside}, tmp_path / "a.pt")
    source = incoming(tmp_path / "a.pt", tmp_path / "work")
    assert source.plain == {}
    assert list(read_header(source.files["a.safetensors"]).tensors) == ["<ink>"]
    save_file({"<ink>": VECTOR}, tmp_path / "b.pt")
    with (tmp_path / "b.pt").open("ab") as file:
        file.write(saved({"t": VECTOR}))
    with pytest.raises(Refused, match="after its header"):
        read_header(incoming(tmp_path / "b.pt", tmp_path / "work").files["b.safetensors"])


def test_what_would_be_run_is_named_and_nothing_is_published(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ink.pt").write_bytes(CALLS["REDUCE of posix.system"][0])
    with pytest.raises(Refused, match=r"'posix\.system' in it, which no weights file needs: it was not run"):
        registry.publish(tmp_path / "ink.pt", "e/ink")
    assert registry.names() == ()
    assert not (tmp_path / CANARY).exists()


def test_the_publishers_limit_goes_before_the_sound_one(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(saved(VECTOR))
    source = replace(Source.scan(tmp_path / "a.pt"), work=tmp_path / "work", max_bytes=100)
    with pytest.raises(Refused, match="more than 100; --max-size raises the limit"):
        with_safetensors(source)


def test_a_mark_before_a_base_s_config_is_taken_off_so_that_diffusers_reads_it(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    plain = registry.publish(tiny_base, "b/plain")
    shutil.copytree(tiny_base, tmp_path / "base")
    config = tmp_path / "base" / "unet" / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    with pytest.raises(OSError, match="not a valid JSON file"):
        UNet2DConditionModel.load_config(config.parent)
    assert registry.publish(tmp_path / "base", "b/plain").digest == plain.digest


def test_weights_that_no_format_reads_are_sound_too(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "safety_checker").mkdir()
    (tmp_path / "base" / "safety_checker" / "model.safetensors").write_text("<html>login</html>")
    with pytest.raises(Refused, match=r"^safety_checker/model\.safetensors is not a sound .* it is a web page"):
        registry.publish(tmp_path / "base", "b/broken")
