"""Every algorithm of LyCORIS, on every family, drawn as LyCORIS itself draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from scumble_registry.compatibility.original_names import original_names
from support.tiny_lycoris import ALGORITHMS, CONVOLUTIONS, LINEAR, TEXT, adapt, layers, save, state

if TYPE_CHECKING:
    from support.lora_bench import Bench

pytestmark = pytest.mark.oracle
FAMILIES = ("sd1", "sd2", "sdxl")


def speller(family: str, component: str, modules: list[str]) -> Callable[[str], str]:
    """kohya's spelling; SDXL's UNet by its original names."""
    original = original_names(modules) if component == "unet" and family == "sdxl" else {}
    first = "lora_te1_" if family == "sdxl" else "lora_te_"
    prefix = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}[component]
    # transformers leaves text_model out of SDXL's first encoder and of SD's, files never do.
    bare = "text_model." if component == "text_encoder" else ""
    return lambda name: prefix + (bare + original.get(name, name)).replace(".", "_")


def chosen(name: str, component: str, model: Any) -> dict[str, Any]:
    if name == "norms":
        return layers(model, ("norm", "norm1", "norm2", "norm3", "conv_norm_out"))
    found = layers(model, (*LINEAR, *CONVOLUTIONS) if component == "unet" else TEXT)
    if name == "BOFT":  # LyCORIS' butterflies know no 48 rows
        return {key: layer for key, layer in found.items() if layer.weight.shape[0] % 48}
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_is_drawn_as_lycoris_draws_it(bench: Bench, tmp_path: Path, name: str, family: str) -> None:
    pipeline, tensors = bench.pipeline(family), {}
    components = [part for part in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipeline, part)]
    for seed, component in enumerate(components):
        model = getattr(pipeline, component)
        every = list(model.named_modules())
        made = adapt(ALGORITHMS[name], chosen(name, component, model), seed)
        tensors |= state(made, speller(family, component, [module for module, _ in every]))
    file = save(tmp_path / "a.safetensors", tensors)
    bench.compare(family, file, pipeline, name=f"{name} (LyCORIS)", oracle="LyCORIS")
