"""What is exported and published again has the same record; what a layout cannot say is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scumble.errors import InvalidRequest, Refused
from scumble_registry import Registry, Version
from scumble_registry.compatibility import BaseCompatibility
from scumble_registry.formats.lora.export import LAYOUTS, LoraLayout, export
from scumble_registry.formats.lora.record import (
    Dense,
    Gain,
    Kronecker,
    LoraModule,
    Magnitude,
    Module,
    Pair,
    Product,
    Rotation,
    make_module,
    read_record,
    write_record,
)

pytest.importorskip("torch")
TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.mid_block.resnets.0.conv1"
NORM = "unet.mid_block.resnets.0.norm1"
LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"
FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def opened(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    from support.tiny_families import make_tiny_sd2, make_tiny_sdxl

    files = tmp_path_factory.mktemp("bases")
    with Registry.open(tmp_path_factory.mktemp("home"), create=True) as registry:
        registry.publish(tiny_base, "base/sd1")
        registry.publish(make_tiny_sd2(files / "sd2"), "base/sd2")
        registry.publish(make_tiny_sdxl(files / "sdxl"), "base/sdxl")
        yield registry


def base_of(registry: Registry, family: str) -> BaseCompatibility:
    found = registry.resolve(f"base/{family}").manifest.compatibility
    assert isinstance(found, BaseCompatibility)
    return found


def draw(seed: int, *shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def factors(shape: tuple[int, ...], rank: int, alpha: float, dtype: Any = np.float16) -> LoraModule:
    ones = (1,) * (len(shape) - 2)
    return make_module("a", draw(1, rank, *shape[1:], dtype=dtype), draw(2, shape[0], rank, *ones, dtype=dtype), alpha)


def plain(base: BaseCompatibility) -> dict[str, Module]:
    """Factors of several ranks and alphas on every third layer."""
    chosen = sorted(base.targets.items())[::3]
    return {name: factors(shape, 1 + i % 3, 0.7 * (1 + i % 4)) for i, (name, shape) in enumerate(chosen)}


def others(base: BaseCompatibility) -> dict[str, Module]:
    """One of each kind that only kohya's layout says."""
    shapes = base.targets
    out, into = shapes[TO_Q]
    block, name = "unet.mid_block.attentions.0.transformer_blocks.0.", "unet.mid_block.attentions.0."
    wide = shapes[f"{block}attn1.to_out.0"]
    halves = [Pair(draw(i, out, 5), draw(i + 1, 5, into)) for i in (3, 5)]
    mixed = dataclasses.replace(
        factors(shapes[LINEAR], 2, 3.0), inner=Pair(draw(7, shapes[LINEAR][1], 2), draw(8, 2, shapes[LINEAR][1]))
    )
    conv = shapes[CONV]
    found: dict[str, Module] = {
        TO_Q: Product(halves[0], halves[1], 2.5, (out, into)),
        f"{block}attn1.to_k": Kronecker(draw(1, 2, 2), draw(2, out // 2, into // 2), Magnitude(draw(3, into), 1)),
        f"{block}attn1.to_v": Gain(draw(1, out), 0),
        f"{block}attn2.to_q": Gain(draw(1, into), 1),
        f"{block}attn1.to_out.0": Dense(draw(1, *wide, dtype=np.float16), bias=draw(2, wide[0], dtype=np.float16)),
        f"{block}attn2.to_out.0": Rotation(draw(1, 1, out // 4, 4, 4), 0, draw(2, out)),
        LINEAR: mixed,
        CONV: dataclasses.replace(factors(conv, 2, 1.0), magnitude=Magnitude(draw(4, conv[1]), 1)),
        NORM: Dense(draw(1, conv[1]), bias=draw(2, conv[1])),
        f"{name}proj_out": Dense(None, bias=draw(1, shapes[f"{name}proj_out"][0])),
    }
    return dict(sorted(found.items()))


def again(registry: Registry, record: dict[str, Module], layout: LoraLayout, family: str, folder: Path) -> Version:
    """Exported, then published."""
    folder.mkdir()
    export(record, layout, folder, base=base_of(registry, family), metadata={"modelspec.title": "ink"})
    path = folder if layout == "peft" else next(folder.iterdir())
    return registry.publish(path, f"again/{layout}", base=f"base/{family}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_come_back_bit_for_bit(opened: Registry, tmp_path: Path, layout: LoraLayout, family: str) -> None:
    record = plain(base_of(opened, family))
    if layout == "peft":  # which names no second text encoder but by its folder
        assert {name.partition(".")[0] for name in record} >= {"unet", "text_encoder"}
    version = again(opened, record, layout, family, tmp_path / "out")
    assert opened.record_path(version).read_bytes() == write_record(record)


@pytest.mark.parametrize("layout", ["diffusers", "peft", "kohya"])
def test_a_dora_by_rows_comes_back(opened: Registry, tmp_path: Path, layout: LoraLayout) -> None:
    record: dict[str, Module] = {
        name: dataclasses.replace(module, magnitude=Magnitude(draw(5, module.shape[0]), 0))
        for name, module in plain(base_of(opened, "sd1")).items()
        if isinstance(module, LoraModule)
    }
    version = again(opened, record, layout, "sd1", tmp_path / "out")
    assert opened.record_path(version).read_bytes() == write_record(record)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_comes_back_from_kohyas_layout(opened: Registry, tmp_path: Path, family: str) -> None:
    record = others(base_of(opened, family))
    version = again(opened, record, "kohya", family, tmp_path / "out")
    assert opened.record_path(version).read_bytes() == write_record(record)


def test_every_kind_survives_being_written_and_read(opened: Registry, tmp_path: Path) -> None:
    base = base_of(opened, "sd1")
    record = others(base) | {
        "unet.conv_out": Rotation(draw(1, 2, 1, 4, 4), 0),
        "unet.conv_in": Gain(draw(1, 4), 1, draw(2, 16), draw(3, 16)),
        "unet.time_embedding.linear_1": Rotation(draw(1, 1, 4, 4, 4), 1),
    }
    path = tmp_path / "record"
    path.write_bytes(write_record(record))
    assert write_record(read_record(path)) == path.read_bytes()
    assert {name: type(module) for name, module in read_record(path).items()} == {
        name: type(module) for name, module in record.items()
    }


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
@pytest.mark.parametrize("target", [TO_Q, NORM, CONV, LINEAR])
def test_what_a_layout_cannot_say_is_refused_by_name(
    opened: Registry, tmp_path: Path, layout: LoraLayout, target: str
) -> None:
    record = {target: others(base_of(opened, "sd1"))[target]}
    with pytest.raises(Refused, match=target):
        export(record, layout, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_butterfly_has_no_file(opened: Registry, tmp_path: Path) -> None:
    record: dict[str, Module] = {TO_Q: Rotation(draw(1, 2, 4, 8, 8), 0)}
    with pytest.raises(Refused, match="rotation"):
        export(record, "kohya", tmp_path, base=base_of(opened, "sd1"))


def test_kohyas_names_need_the_base(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="name the base"):
        export({TO_Q: factors((8, 8), 1, 1.0)}, "kohya", tmp_path)


def test_diffusers_and_peft_load_what_is_exported(opened: Registry, tiny_base: Path, tmp_path: Path) -> None:
    """And make of it what the record says."""
    import peft
    import torch
    from diffusers import StableDiffusionPipeline

    record = {name: module for name, module in plain(base_of(opened, "sd1")).items() if name.startswith("unet.")}
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    for layout in ("diffusers", "peft"):
        (tmp_path / layout).mkdir()
        export(record, layout, tmp_path / layout)
    unet = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True).unet
    pipeline.load_lora_weights(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors", adapter_name="ink")
    of_peft = peft.PeftModel.from_pretrained(unet, tmp_path / "peft", adapter_name="ink").base_model.model
    for model in (pipeline.unet, of_peft):
        for name, module in record.items():
            assert isinstance(module, LoraModule)
            found = model.get_submodule(name.removeprefix("unet.")).get_delta_weight("ink")
            down, up = (torch.tensor(each.astype(np.float32)).flatten(1) for each in (module.down, module.up))
            expected = (up @ down).view(found.shape) * module.scale
            assert (found - expected).abs().max() <= 1e-3 * expected.abs().max(), name
