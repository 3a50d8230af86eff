"""A whole model has the tensors that its config describes, by name and shape; else it is refused by name."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from scumble.errors import Refused, Unavailable
from scumble_registry import Registry
from scumble_registry.formats import structure
from scumble_registry.formats.dreambooth import read_changed
from scumble_registry.formats.source import Hints
from support import control_nets
from support.broken_models import Tensors, edit_tensors, old_text, old_vae, unchecked
from support.commands import Scumble
from support.single_files import write_single_file
from support.tiny_families import make_tiny_sdxl
from support.tiny_ip import make_image_encoder, make_ip_adapter
from support.tiny_variant import make_checkpoint

Change = Callable[[Tensors], object]
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"
UNET, VAE, TEXT = f"unet/{DIFFUSERS}", f"vae/{DIFFUSERS}", f"text_encoder/{TRANSFORMERS}"
ENCODER = f"image_encoder/{TRANSFORMERS}"
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"
POSITIONS = "position_embedding.weight"


def take(name: str) -> Change:
    """Remove the tensor whose name ends so."""
    return lambda tensors: tensors.pop(next(key for key in tensors if key.endswith(name)))


def bend(name: str) -> Change:
    """Give the tensor whose name ends so another length: 7."""
    return lambda tensors: tensors.update({next(key for key in tensors if key.endswith(name)): torch.zeros(7)})


def add(name: str) -> Change:
    return lambda tensors: tensors.update({name: torch.zeros(1)})


BROKEN: dict[str, tuple[str, Change, str]] = {
    "a UNet's norm is missing": (UNET, take("conv_norm_out.weight"), "unet lacks 1 tensor .*: conv_norm_out.weight"),
    "a UNet's norm is short": (UNET, bend("conv_norm_out.weight"), "unet has .*: conv_norm_out.weight is 7 and not 16"),
    "a UNet has a stray": (UNET, add("stray"), "unet has 1 tensor that its config does not describe: stray;"),
    "a VAE's end is missing": (VAE, take("decoder.conv_out.weight"), "vae lacks 1 tensor .*decoder.conv_out.weight"),
    "a VAE has a stray": (VAE, add("stray"), "vae has 1 tensor .*: stray;"),
    "a text's positions are missing": (TEXT, take(POSITIONS), f"text_encoder lacks 1 tensor .*{POSITIONS}"),
    "a text's norm is short": (TEXT, bend("final_layer_norm.bias"), "final_layer_norm.bias is 7 and not 32"),
    "a text has a stray": (TEXT, add("stray"), "text_encoder has 1 tensor .*: stray;"),
    "its image encoder's layer is missing": (ENCODER, take(FC1), f"image_encoder lacks 1 tensor .*{FC1}"),
    "a layer too many": (UNET, add("mid_block.resnets.9.norm1.weight"), r"mid_block\.resnets\.9\.norm1\.weight"),
}


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A base with an image encoder of its own."""
    shutil.copytree(tiny_base, tmp_path / "base")
    make_image_encoder(tmp_path / "base/image_encoder")
    return tmp_path / "base"


@pytest.mark.parametrize("fault", BROKEN)
def test_a_base_that_is_not_whole_is_refused_by_name(registry: Registry, folder: Path, fault: str) -> None:
    file, change, says = BROKEN[fault]
    edit_tensors(folder / file, change)
    with pytest.raises(Refused, match=says):
        registry.publish(folder, "b/a")
    assert registry.names() == ()


def test_on_the_command_line_the_exit_code_is_4_and_leftovers_are_an_option(scumble: Scumble, folder: Path) -> None:
    edit_tensors(folder / UNET, add("stray"))
    status, _, says = scumble("publish", folder, "--name", "b/a")
    assert status == 4
    assert "stray" in says
    assert "--allow-leftover" in says
    assert "pictures are wrong if the model was trained with them" in " ".join(says.split())
    assert scumble("publish", folder, "--name", "b/a", "--allow-leftover")[0] == 0
    edit_tensors(folder / UNET, take("conv_norm_out.weight"))
    status, _, says = scumble("publish", folder, "--name", "b/b", "--allow-leftover")
    assert status == 4
    assert "conv_norm_out.weight" in says


@pytest.mark.parametrize("shards", [False, True])
def test_leftovers_are_taken_out_of_what_is_stored(registry: Registry, folder: Path, shards: bool) -> None:
    if shards:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        shutil.rmtree(folder / "unet")
        unet.save_pretrained(folder / "unet", max_shard_size="100KB")
        index = json.loads((folder / f"unet/{DIFFUSERS}.index.json").read_text())
        last = max(index["weight_map"].values())
        index["weight_map"]["stray"] = last
        (folder / f"unet/{DIFFUSERS}.index.json").write_text(json.dumps(index))
        edit_tensors(folder / "unet" / last, add("stray"))
    else:
        edit_tensors(folder / UNET, add("stray"))
    version = registry.publish(folder, "b/a", allow_leftover=True)
    assert version.manifest.leftover == ("unet/stray",)
    stored = registry.materialise(version) / "unet"
    _, told = UNet2DConditionModel.from_pretrained(stored, output_loading_info=True)
    assert (told["missing_keys"], told["unexpected_keys"]) == ([], [])
    assert "stray" not in (stored / f"{DIFFUSERS}.index.json").read_text() if shards else True


def test_old_spellings_are_whole(registry: Registry, folder: Path) -> None:
    edit_tensors(folder / VAE, old_vae)
    edit_tensors(folder / TEXT, old_text)
    position_ids = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    edit_tensors(folder / ENCODER, lambda tensors: tensors.update(position_ids))
    assert registry.publish(folder, "b/a").manifest.leftover == ()


def test_weights_under_a_name_that_no_loader_looks_for_are_refused(registry: Registry, folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/weights.safetensors")
    with pytest.raises(Refused, match=f"unet has no {DIFFUSERS}"):
        registry.publish(folder, "b/a")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}),
        ("unet/config.json", {"transformer_layers_per_block": 10**9}),
        ("vae/config.json", {"layers_per_block": 10**9}),
    ],
)
def test_a_config_of_endless_layers_is_refused_before_it_is_built(
    registry: Registry, folder: Path, file: str, changes: dict[str, int]
) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | changes))
    with pytest.raises(Refused, match=r"it describes more than \d+ tensors"):
        registry.publish(folder, "b/a")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cond_stage_model.transformer.text_model.embeddings.position_embedding.weight", "position_embedding"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1.layer_norm1.bias", "layers.1.layer_norm1.bias"),
        ("model.diffusion_model.out.0.weight", "conv_norm_out.weight"),
        ("first_stage_model.decoder.conv_out.weight", "decoder.conv_out.weight"),
    ],
)
def test_a_single_file_that_is_not_whole_is_refused_as_base_and_as_checkpoint(
    registry: Registry, tiny_base: Path, tmp_path: Path, name: str, says: str
) -> None:
    registry.publish(tiny_base, "b/base")
    file = write_single_file(make_checkpoint(tiny_base, tmp_path / "tuned"), tmp_path / "a.safetensors")
    own = next(key for key in load_file(file) if key in {name, name.replace("text_model.", "")})
    edit_tensors(file, take(own))
    for base in (None, "b/base"):
        with pytest.raises(Refused, match=re.escape(says)):
            registry.publish(file, "b/a", base=base, hints=Hints(lambda: tiny_base))


def test_a_checkpoint_without_a_norm_does_not_take_its_bases(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    registry.publish(tiny_base, "b/base")
    tuned = make_checkpoint(tiny_base, tmp_path / "tuned", seed=1)
    edit_tensors(tuned / UNET, take("conv_norm_out.weight"))
    with pytest.raises(Refused, match=r"unet lacks 1 tensor that its config describes: conv_norm_out\.weight"):
        registry.publish(tuned, "b/a", base="b/base")


@pytest.mark.parametrize(
    ("file", "tensor"), [(UNET, "conv_norm_out.weight"), (f"text_encoder_2/{TRANSFORMERS}", "final_layer_norm.bias")]
)
def test_nor_does_one_that_was_published_before_this_was_checked(
    registry: Registry, tmp_path: Path, file: str, tensor: str
) -> None:
    base = make_tiny_sdxl(tmp_path / "base")
    parts = ("unet", "text_encoder_2")
    tuned = make_checkpoint(base, tmp_path / "tuned", seed=1, components=parts)
    edit_tensors(tuned / file, take(tensor))
    first = registry.publish(base, "b/base")
    with unchecked():
        version = registry.publish(tuned, "b/a", base="b/base")
    with pytest.raises(Refused, match=rf"lacks 1 tensor .*{re.escape(tensor)}"):
        read_changed(registry.stored(version), registry.stored(first))


def test_without_diffusers_a_whole_model_cannot_be_published(
    registry: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.utils", None)
    structure.described.cache_clear()
    with pytest.raises(Unavailable, match=r"pip install 'scumble\[build\]'"):
        registry.publish(folder, "b/a")


def test_an_image_encoder_that_is_not_whole_is_refused_alone_and_in_an_adapters_folder(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    registry.publish(tiny_base, "b/base")
    make_ip_adapter(tiny_base, tmp_path / "ip/ip.safetensors", "base")
    encoder = make_image_encoder(tmp_path / "ip/image_encoder")
    edit_tensors(encoder / TRANSFORMERS, add("stray"))
    assert registry.publish(encoder, "e/a", allow_leftover=True).manifest.leftover == ("stray",)
    stored = registry.publish(tmp_path / "ip", "i/a", base="b/base", allow_leftover=True)
    assert stored.manifest.leftover == ("image_encoder/stray",)
    edit_tensors(encoder / TRANSFORMERS, take(FC1))
    with pytest.raises(Refused, match=rf"the image encoder lacks 1 tensor .*{FC1}"):
        registry.publish(encoder, "e/b", allow_leftover=True)
    with pytest.raises(Refused, match=rf"image_encoder lacks 1 tensor .*{FC1}"):
        registry.publish(tmp_path / "ip", "i/b", base="b/base", allow_leftover=True)


def test_a_vae_that_is_not_whole_is_refused_as_a_folder_and_as_weights_alone(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base / "vae", tmp_path / "vae")
    edit_tensors(tmp_path / "vae" / DIFFUSERS, add("stray"))
    with pytest.raises(Refused, match="the VAE has 1 tensor that its config does not describe: stray"):
        registry.publish(tmp_path / "vae", "v/a")
    version = registry.publish(tmp_path / "vae", "v/a", allow_leftover=True)
    assert version.manifest.leftover == ("stray",)
    assert version == registry.publish(tmp_path / "vae", "v/a", allow_leftover=True)
    _, told = AutoencoderKL.from_pretrained(registry.materialise(version), output_loading_info=True)
    assert told["unexpected_keys"] == []
    edit_tensors(tmp_path / "vae" / DIFFUSERS, take("encoder.conv_norm_out.bias"))
    (tmp_path / "vae/config.json").unlink()
    with pytest.raises(Refused, match=r"the VAE lacks 1 tensor .*encoder.conv_norm_out.bias"):
        registry.publish(tmp_path / "vae" / DIFFUSERS, "v/b", hints=Hints(lambda: tiny_base), allow_leftover=True)


@pytest.mark.parametrize("kind", ["net", "net without config", "union", "t2i", "original", "original without base"])
def test_a_controlnet_that_is_not_whole_is_refused(
    registry: Registry, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    registry.publish(tiny_base, "b/base")
    unet = control_nets.load_unet(tiny_base)
    net, file, norm = tmp_path / "net", tmp_path / "net" / DIFFUSERS, "mid_block.resnets.0.norm1.bias"
    match kind:
        case "union":
            control_nets.make_union(unet, 1).save_pretrained(net)
        case "t2i":
            control_nets.make_t2i_for(unet, 1).save_pretrained(net)
            norm = "adapter.body.0.resnets.0.block2.bias"
        case "original" | "original without base":
            file = net = control_nets.write_cldm(control_nets.make_net(unet, 1), tmp_path / "net.safetensors")
            norm = "middle_block.0.in_layers.0.bias"
        case _:
            control_nets.make_net(unet, 1).save_pretrained(net)
    if kind == "net without config":
        (net / "config.json").unlink()
    base = None if kind in {"original without base", "t2i"} else "b/base"
    assert registry.publish(net, "c/a", base=base).manifest.leftover == ()
    edit_tensors(file, take(norm))
    says = "mid_block.resnets.0.norm1.bias" if kind.startswith("original") else norm
    with pytest.raises(Refused, match=f"the net lacks 1 tensor that its config describes: {says}"):
        registry.publish(net, "c/b", base=base)


def test_a_nets_leftovers_are_taken_out(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    net = tmp_path / "net"
    control_nets.make_net(control_nets.load_unet(tiny_base), 1).save_pretrained(net)
    edit_tensors(net / DIFFUSERS, add("stray"))
    with pytest.raises(Refused, match=r"the net has 1 tensor .*: stray;"):
        registry.publish(net, "c/a")
    version = registry.publish(net, "c/a", allow_leftover=True)
    assert version.manifest.leftover == ("stray",)
    assert "stray" not in load_file(registry.materialise(version) / DIFFUSERS)
