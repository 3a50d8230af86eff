"""Files of the ControlNet family as diffusers' models, against diffusers' own loaders and merged weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from scumble.errors import Refused
from scumble_build.graphs.control_models import load_net, load_t2i, load_union
from support.control_nets import load_unet, make_net, make_t2i, make_union, write_cldm, write_control_lora

FILE = "diffusion_pytorch_model.safetensors"


def equal(mine: Any, theirs: Any) -> bool:
    expected = theirs.state_dict()
    found = mine.state_dict()
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_diffusers_folders(tiny_base: Path, tmp_path: Path) -> None:
    unet = load_unet(tiny_base)
    made = {"net": make_net(unet, 1), "union": make_union(unet, 2), "t2i": make_t2i((16, 32), 3)}
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
    assert equal(load_net(tmp_path / "net", lambda: tiny_base / "unet"), made["net"])
    assert equal(load_union(tmp_path / "union"), made["union"])
    assert equal(load_t2i(tmp_path / "t2i"), made["t2i"])


def test_the_original_layout_equals_diffusers_own_converter(tiny_base: Path, tmp_path: Path) -> None:
    made = make_net(load_unet(tiny_base), 1)
    made.save_pretrained(tmp_path / "config")
    write_cldm(made, tmp_path / FILE)
    theirs = ControlNetModel.from_single_file(
        str(tmp_path / FILE), config=str(tmp_path / "config"), local_files_only=True
    )
    shutil.copy(tmp_path / "config" / "config.json", tmp_path)  # content decides, not what lies beside it
    mine = load_net(tmp_path, lambda: tiny_base / "unet")
    assert equal(mine, theirs)
    assert equal(mine, made)


def test_differences_are_added_to_the_base(tiny_base: Path, tmp_path: Path) -> None:
    unet = load_unet(tiny_base)
    made = make_net(unet, 1)
    with torch.no_grad():
        made.conv_in.weight += 0.5
    write_cldm(made, tmp_path / FILE, base=unet)
    found = load_net(tmp_path, lambda: tiny_base / "unet").state_dict()
    for name, expected in made.state_dict().items():
        assert (found[name] - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_control_lora_is_the_base_plus_its_factors(tiny_base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """W = W_base + up @ down; norms and biases are the base's, zero convolutions and the embedding its own."""
    unet = load_unet(tiny_base)
    made = make_net(unet, 1)
    tensors = {name: value.to(dtype) for name, value in load_file(write_control_lora(made, tmp_path / "a")).items()}
    save_file(tensors, tmp_path / FILE)
    found = load_net(tmp_path, lambda: tiny_base / "unet").state_dict()
    base = unet.state_dict()

    def merged(name: str, stem: str) -> torch.Tensor:
        up, down = (tensors[f"{stem}.{role}"].float().flatten(1) for role in ("up", "down"))
        return base[name] + (up @ down).view_as(base[name])

    places = {
        "conv_in.weight": "input_blocks.0.0",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
        ),
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.3.0.skip_connection",
        "mid_block.resnets.1.time_emb_proj.weight": "middle_block.2.emb_layers.1",
        "time_embedding.linear_2.weight": "time_embed.2",
    }
    for name, stem in places.items():
        assert (found[name] - merged(name, stem)).abs().max() <= 1e-6
        assert (found[name] - base[name]).abs().max() >= 1e-2
    assert torch.equal(found["mid_block.resnets.0.norm1.weight"], base["mid_block.resnets.0.norm1.weight"])
    assert torch.equal(found["controlnet_mid_block.weight"], tensors["middle_block_out.0.weight"].float())


def test_a_weight_that_is_missing_is_never_drawn_at_random(tiny_base: Path, tmp_path: Path) -> None:
    make_net(load_unet(tiny_base), 1).save_pretrained(tmp_path)
    state = load_file(tmp_path / FILE)
    del state["mid_block.resnets.0.conv1.bias"]
    save_file(state, tmp_path / FILE)
    with pytest.raises(Refused, match=r"mid_block\.resnets\.0\.conv1\.bias"):
        load_net(tmp_path, lambda: tiny_base / "unet")


def test_a_config_that_makes_no_net(tiny_base: Path, tmp_path: Path) -> None:
    make_net(load_unet(tiny_base), 1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"norm_num_groups": 5}))
    with pytest.raises(Refused, match="does not describe a valid ControlNetModel"):
        load_net(tmp_path, lambda: tiny_base / "unet")
