"""What is saved is what was trained, for diffusers with PEFT and for the registry, in both layouts."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from scumble_registry import Registry
from scumble_registry.compatibility import LoraCompatibility, canonical_name
from scumble_registry.formats.lora import LoraModule, read_record
from scumble_trainers.base import find_base, load_base
from scumble_trainers.methods.lora.files import COMPONENTS, FILE
from scumble_trainers.methods.lora.model import LoraTraining
from scumble_trainers.methods.lora.settings import LoraSettings

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"alpha": 10},
    "patterns": {
        "rank_pattern": {"attn2.*": 2, "mid_block.*": 3},
        "alpha_pattern": {"attn1.to_q": 3, "text_encoder.*fc1": 7},
    },
    "convolution": {"convolution": True, "convolution_rank": 2, "alpha": 3},
    "rank-stabilised": {"rank_stabilised": True, "rank_pattern": {"to_k": 2}},
    "dora": {"dora": True, "convolution": True, "alpha": 2},
}


def trained(folder: Path, **changes: Any) -> LoraTraining:
    """A LoRA of everything, with random factors in place of trained ones."""
    every = {"steps": 1, "rank": 4, "text_encoder": True, "feed_forward": True, "save_dtype": "fp32"}
    settings = LoraSettings.model_validate(every | changes)
    base = find_base(str(folder), folder.parent / "no registry")
    LoraTraining.check(settings, base, [])
    torch.manual_seed(1)
    method = LoraTraining(load_base(base), settings, base)
    with torch.no_grad():
        for parameter in method.trained().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def merged(pipeline: Any) -> dict[str, Tensor]:
    """W′ of every adapted layer, as PEFT merges it."""
    found: dict[str, Tensor] = {}
    for component in COMPONENTS:
        part = deepcopy(getattr(pipeline, component, None))
        for name, layer in [] if part is None else part.named_modules():
            if isinstance(layer, LoraLayer):
                layer.merge(safe_merge=True)
                found[canonical_name(f"{component}.{name}")] = layer.base_layer.weight.detach()
    return found


def loaded(base: Path, folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipeline.load_lora_weights(folder)
    return pipeline


def of_record(module: LoraModule, weight: Tensor) -> Tensor:
    """W′ by the registry's words."""
    up, down = (torch.from_numpy(np.array(values)) for values in (module.up, module.down))
    changed = weight + module.scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    if module.magnitude is None:
        return changed
    assert module.magnitude.axis == 0
    rows = changed.flatten(1)
    lengths = torch.from_numpy(np.array(module.magnitude.lengths))
    return (rows / rows.norm(dim=1, keepdim=True) * lengths[:, None]).reshape(weight.shape)


def weights(base: Path) -> dict[str, Tensor]:
    pipeline = DiffusionPipeline.from_pretrained(base, local_files_only=True)
    return {
        canonical_name(f"{component}.{name}"): parameter.detach()
        for component in COMPONENTS
        if getattr(pipeline, component, None) is not None
        for name, parameter in getattr(pipeline, component).named_parameters()
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_diffusers_and_the_registry_read_what_was_trained(
    sdxl_folder: Path, tmp_path: Path, options: dict[str, Any], layout: str
) -> None:
    method = trained(sdxl_folder, layout=layout, **options)
    expected = merged(method.pipeline)
    method.save(tmp_path, "fp32")

    if layout == "diffusers" or not options.get("dora"):  # diffusers 0.42 leaves kohya's magnitudes out, and says so
        assert_same(merged(loaded(sdxl_folder, tmp_path)), expected)
    with Registry.open(tmp_path / "home", create=True) as registry:
        registry.publish(sdxl_folder, "tiny/base")
        version = registry.publish(tmp_path / FILE, "styles/ink", base="tiny/base")
        record = read_record(registry.record_path(version))
    told = version.manifest.compatibility
    assert isinstance(told, LoraCompatibility)
    assert told.magnitudes == bool(options.get("dora"))
    base = weights(sdxl_folder)
    assert_same({name: of_record(module, base[f"{name}.weight"]) for name, module in record.items()}, expected)


@pytest.mark.parametrize("options", [OPTIONS["rank-stabilised"], OPTIONS["plain"]], ids=["rank-stabilised", "alpha"])
def test_a_reader_that_ignores_the_header_has_the_same_weights(
    base_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    method = trained(base_folder, **options)
    method.save(tmp_path, "fp32")
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, {"format": "pt"})

    assert_same(merged(loaded(base_folder, tmp_path)), merged(method.pipeline))


def test_sizes_are_those_that_were_asked_for(sdxl_folder: Path) -> None:
    method = trained(sdxl_folder, convolution=True, convolution_rank=2, **OPTIONS["patterns"])
    sizes = {
        f"{component}.{name}": (layer.r["default"], layer.lora_alpha["default"])
        for component in COMPONENTS
        for name, layer in getattr(method.pipeline, component).named_modules()
        if isinstance(layer, LoraLayer)
    }
    block = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
    assert sizes[f"{block}.attn1.to_q"] == (4, 3)
    assert sizes[f"{block}.attn1.to_k"] == (4, 4)
    assert sizes[f"{block}.attn2.to_q"] == (2, 2)
    assert sizes["unet.mid_block.resnets.0.conv1"] == (3, 3)
    assert sizes["unet.down_blocks.0.resnets.0.conv1"] == (2, 2)
    assert sizes["unet.down_blocks.1.resnets.0.conv_shortcut"] == (2, 2)
    assert sizes["unet.down_blocks.0.downsamplers.0.conv"] == (2, 2)
    assert {size for name, size in sizes.items() if name.endswith("mlp.fc1")} == {(4, 7)}


def test_sdxls_first_encoder_has_no_factors_where_nothing_is_read(sdxl_folder: Path) -> None:
    """Only its last but one states are: with several processes, parameters without a gradient are an error."""
    names = merged(trained(sdxl_folder).pipeline)
    last, before = "text_encoder.text_model.encoder.layers.2.", "text_encoder.text_model.encoder.layers.1."
    assert not any(name.startswith(last) for name in names)
    assert any(name.startswith(before) for name in names)
    assert any(name.startswith(last.replace("encoder.text", "encoder_2.text")) for name in names)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_16_bits_are_for_matrices_and_the_bytes_are_always_the_same(
    base_folder: Path, tmp_path: Path, layout: str
) -> None:
    for name in ("a", "b"):
        trained(base_folder, dora=True, layout=layout).save(tmp_path / name, "fp16")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    types = {name.rpartition(".lora_")[2]: value.dtype for name, value in load_file(tmp_path / "a" / FILE).items()}
    halves = {"A.weight", "B.weight", "down.weight", "up.weight"}
    assert {type_ for name, type_ in types.items() if name in halves} == {torch.float16}
    assert {type_ for name, type_ in types.items() if name not in halves} == {torch.float32}
