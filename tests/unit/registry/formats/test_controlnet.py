"""ControlNet and its kin: what is recognised, what is derived, what fits, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scumble.errors import Incompatible, Refused
from scumble_registry import Registry
from scumble_registry.compatibility import ControlNetCompatibility
from scumble_registry.formats.safetensors_header import write

torch = pytest.importorskip("torch")
control_nets = pytest.importorskip("support.control_nets")

CONFIG = "config.json"


@pytest.fixture(scope="module")
def unet(tiny_base: Path) -> Any:
    return control_nets.load_unet(tiny_base)


@pytest.fixture
def base(registry: Registry, tiny_base: Path) -> str:
    return registry.publish(tiny_base, "tiny/base").ref


def published(registry: Registry, path: Path, **options: Any) -> ControlNetCompatibility:
    version = registry.publish(path, f"c/{len(registry.names())}", **options)
    assert version.manifest.record is None
    assert "diffusion_pytorch_model.safetensors" in version.manifest.files
    assert isinstance(version.manifest.compatibility, ControlNetCompatibility)
    return version.manifest.compatibility


def save(path: Path, names: dict[str, tuple[int, ...]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(write({name: np.ones(shape, np.float32) for name, shape in names.items()}, {}))
    return path


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def test_a_diffusers_net(registry: Registry, base: str, unet: Any, tmp_path: Path) -> None:
    control_nets.make_net(unet, 1, global_pool_conditions=True).save_pretrained(tmp_path / "net")
    found = published(registry, tmp_path / "net", base=base)
    assert (found.form, found.family, found.cross_attention_dim, found.in_channels) == ("net", "sd1", 32, 4)
    assert (found.widths, found.conditioning_channels, found.pools) == ((16, 16, 16, 32, 32), 3, True)
    (tmp_path / "net" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "net" / "canny.safetensors")
    assert published(registry, tmp_path / "net").widths == found.widths, "the file's name is no content"


def test_a_union_net(registry: Registry, base: str, unet: Any, tmp_path: Path) -> None:
    control_nets.make_union(unet, 1).save_pretrained(tmp_path / "net")
    found = published(registry, tmp_path / "net", base=base)
    assert (found.form, found.control_types, found.widths) == ("union", 6, (16, 16, 16, 32, 32))


@pytest.mark.parametrize(("kind", "channels"), [("full_adapter", (16, 32)), ("light_adapter", (16,))])
def test_a_t2i_adapter(registry: Registry, tmp_path: Path, kind: str, channels: tuple[int, ...]) -> None:
    control_nets.make_t2i(channels, 1, kind, in_channels=1).save_pretrained(tmp_path / "t2i")
    found = published(registry, tmp_path / "t2i")
    widths = channels if kind == "full_adapter" else (*channels, channels[-1])
    assert (found.form, found.widths, found.conditioning_channels) == ("t2i", widths, 1)
    assert found.cross_attention_dim is None


@pytest.mark.parametrize("low_rank", [True, False])
def test_files_in_the_original_layout(registry: Registry, base: str, unet: Any, tmp_path: Path, low_rank: bool) -> None:
    write_original = control_nets.write_control_lora if low_rank else control_nets.write_cldm
    found = published(registry, write_original(control_nets.make_net(unet, 1), tmp_path / "a.safetensors"), base=base)
    assert found.form == ("control_lora" if low_rank else "net")
    assert (found.widths, found.cross_attention_dim) == ((16, 16, 16, 32, 32), 32)


def test_what_does_not_fit_is_named_on_both_sides(registry: Registry, base: str, tmp_path: Path) -> None:
    control_nets.make_t2i((16, 16), 1).save_pretrained(tmp_path / "t2i")
    with pytest.raises(Incompatible, match="features of widths 16, 16, but this sd1 base has 16, 32"):
        registry.publish(tmp_path / "t2i", "c/a", base=base)


def test_a_net_of_another_text_width(
    registry: Registry, base: str, make_tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    wider = control_nets.load_unet(make_tiny_base(tmp_path / "wide", width=32))
    control_nets.make_net(wider, 1).save_pretrained(tmp_path / "net")
    with pytest.raises(Incompatible, match="residuals of widths 32, 32, 32, 64, 64, but this sd1 base has 16, 16"):
        registry.publish(tmp_path / "net", "c/a", base=base)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cross_attention_dim": 768}, "cross_attention_dim 768, but the weights have 32"),
        ({"block_out_channels": [16, 16]}, "layers_per_block .*, but the weights have"),
        ({"layers_per_block": 2}, "layers_per_block .*, but the weights have"),
        ({"conditioning_channels": 1}, "conditioning_channels 1, but the weights have 3"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types.0"),
        ({"block_out_channels": [10**9, 10**9]}, "the weights have"),
        ({"transformer_layers_per_block": 10**9}, "transformer_layers_per_block"),
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type text_time"),
        ({"_class_name": "SparseControlNetModel"}, "SparseCtrl"),
        ({"_class_name": "ControlNetXSAdapter"}, "ControlNet-XS"),
    ],
)
def test_a_config_that_says_otherwise(
    registry: Registry, unet: Any, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    control_nets.make_net(unet, 1).save_pretrained(tmp_path / "net")
    edit(tmp_path / "net", **changes)
    with pytest.raises(Refused, match=says):
        registry.publish(tmp_path / "net", "c/a")
    assert registry.names() == ()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight": (2, 2)}, "is incomplete"),
        ({"control_model.zero_convs.0.0.weight": (2, 2), "control_model.a.lora_layer.up.weight": (2, 2)}, "CtrlLoRA"),
        ({"controlnet_cond_embedding.a.weight": (2,), "down_blocks.0.motion_modules.a.weight": (2,)}, "SparseCtrl"),
        ({"controlnet_cond_embedding.a.weight": (2,), "d.temporal_res_block.a": (2,)}, "Stable Video Diffusion"),
        ({"controlnet_cond_embedding.a.weight": (2,), "conv_in.weight": (2, 2)}, "no cross-attention"),
        ({"body.0.block1.weight": (2, 2), "conv_in.weight": (2, 2)}, "reads 2 channels"),
        ({"style_embedding": (2, 2), "ln_pre.weight": (2,)}, "T2I-Adapter for style"),
        ({"down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight": (2, 2)}, "motion module"),
        ({"double_blocks.0.img_attn.proj.weight": (2, 2), "img_in.weight": (2, 2)}, "FLUX"),
        ({"zero_convs.0.0.weight": (2, 2), "input_blocks.7.9.weight": (2,)}, "not understood: input_blocks.7.9.weight"),
        ({"zero_convs.0.0.weight": (2, 2), "conv.weight": (2,)}, "not understood: conv.weight"),
        ({"zero_convs.0.0.weight": (2, 2), "time_embed.0.weight": (2, 2)}, "no cross-attention"),
        ({"lora_controlnet": (0,), "zero_convs.0.0.weight": (2, 2), "time_embed.0.up": (2, 3)}, "no down of its rank"),
        ({"lora_controlnet": (0,), "zero_convs.0.0.weight": (2, 2), "time_embed.0.down": (2, 3)}, "no up beside it"),
    ],
)
def test_kin_that_is_not_served_is_refused_by_name(
    registry: Registry, tmp_path: Path, names: dict[str, tuple[int, ...]], says: str
) -> None:
    with pytest.raises(Refused, match=says):
        registry.publish(save(tmp_path / "a.safetensors", names), "c/a")
    assert registry.names() == ()


def test_a_net_whose_picture_is_embedded_at_another_size(
    registry: Registry, base: str, unet: Any, tmp_path: Path
) -> None:
    control_nets.make_net(unet, 1, conditioning_embedding_out_channels=(8, 8, 16)).save_pretrained(tmp_path / "net")
    with pytest.raises(Incompatible, match="pixels per latent 4, but this sd1 base has 8"):
        registry.publish(tmp_path / "net", "c/a", base=base)


def test_a_net_with_holes(registry: Registry, unet: Any, tmp_path: Path) -> None:
    net = control_nets.make_net(unet, 1)
    net.save_pretrained(tmp_path / "net")
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    file = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(write({key: value for key, value in state.items() if "controlnet_mid" not in key}, {}))
    with pytest.raises(Refused, match=r"controlnet_mid_block\.weight is missing"):
        registry.publish(tmp_path / "net", "c/a")
    state["conv_in.bias"] = np.full_like(state["conv_in.bias"], np.nan)
    file.write_bytes(write(state, {}))
    with pytest.raises(Refused, match=r"conv_in\.bias holds NaN"):
        registry.publish(tmp_path / "net", "c/a")
    (tmp_path / "net" / "b.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(Refused, match="one file of weights is needed"):
        registry.publish(tmp_path / "net", "c/a")


def test_a_net_without_a_config_needs_its_base_where_its_widths_are_no_ones(
    registry: Registry, base: str, unet: Any, tmp_path: Path
) -> None:
    net = control_nets.make_net(unet, 1)
    net.save_pretrained(tmp_path / "net")
    (tmp_path / "net" / CONFIG).unlink()
    file = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(Refused, match="--base REF"):
        registry.publish(file, "c/alone")
    version = registry.publish(file, "c/net", base=base)
    assert "config.json" in version.manifest.files
    registry.pull("c/net", tmp_path / "pulled")
    told = json.loads((tmp_path / "pulled" / CONFIG).read_text())
    assert told["attention_head_dim"] == net.config.attention_head_dim
    assert registry.publish(tmp_path / "pulled", "c/net", base=base).manifest.files == version.manifest.files


def test_of_a_whole_models_file_only_the_net_is_kept(registry: Registry, base: str, unet: Any, tmp_path: Path) -> None:
    net = control_nets.make_net(unet, 1)
    alone = torch_load(control_nets.write_cldm(net, tmp_path / "a.safetensors"))
    whole = alone | {
        "model.diffusion_model.out.2.weight": torch.ones(4, 4),
        "first_stage_model.a.weight": torch.ones(2),
    }
    torch.save({"state_dict": whole, "global_step": 3}, tmp_path / "whole.pth")
    version = registry.publish(tmp_path / "whole.pth", "c/whole", base=base)
    assert version.manifest.compatibility == published(registry, tmp_path / "a.safetensors", base=base)
    assert torch_load(stored(registry, "c/whole", tmp_path / "w")).keys() == alone.keys()


def test_a_shuffle_net_is_known_by_its_files_name(registry: Registry, base: str, unet: Any, tmp_path: Path) -> None:
    file = control_nets.write_cldm(control_nets.make_net(unet, 1), tmp_path / "control_v11e_sd15_shuffle.safetensors")
    registry.publish(file, "c/shuffle", base=base)
    pulled = stored(registry, "c/shuffle", tmp_path / "pulled")
    assert registry.find("c/shuffle").manifest.compatibility == published(registry, pulled, base=base)
    assert registry.find("c/shuffle").manifest.compatibility.pools


def test_keys_of_a_net_may_be_left_out(registry: Registry, base: str, unet: Any, tmp_path: Path) -> None:
    file = control_nets.write_cldm(control_nets.make_net(unet, 1), tmp_path / "a.safetensors")
    more = torch_load(file) | {"control_model.new.weight": torch.ones(2)}
    torch.save(more, tmp_path / "more.pth")
    with pytest.raises(Refused, match=r"control_model\.new\.weight"):
        registry.publish(tmp_path / "more.pth", "c/a", base=base)
    version = registry.publish(tmp_path / "more.pth", "c/a", base=base, allow_leftover=True)
    assert version.manifest.leftover == ("control_model.new.weight",)


def torch_load(file: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(file)


def stored(registry: Registry, ref: str, folder: Path) -> Path:
    registry.pull(ref, folder)
    return folder / "diffusion_pytorch_model.safetensors"


def test_an_lllite_fits_the_base_whose_modules_it_names(
    registry: Registry, base: str, unet: Any, tmp_path: Path
) -> None:
    tiny_lllite = pytest.importorskip("support.tiny_lllite")
    lites = tiny_lllite.make_lllite(unet, 1)
    file = tiny_lllite.save_lllite(lites, unet, tmp_path / "a.safetensors")
    found = published(registry, file, base=base)
    assert (found.form, found.family, len(found.modules)) == ("lllite", "sd1", len(lites))
    wider = {name: tiny_lllite.Lite(24, 0) for name in lites}
    tiny_lllite.save_lllite(wider, unet, tmp_path / "b.safetensors")
    with pytest.raises(Incompatible, match="reads 24 channels; this sd1 base has it as 16x16"):
        registry.publish(tmp_path / "b.safetensors", "c/b", base=base)
    with pytest.raises(Refused, match="not understood: more"):
        registry.publish(add(file, more=torch.ones(2)), "c/c", base=base)


def add(file: Path, **tensors: Any) -> Path:
    from safetensors.torch import save_file

    save_file(torch_load(file) | tensors, file)
    return file
