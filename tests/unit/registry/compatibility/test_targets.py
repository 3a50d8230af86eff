"""Targets: an adapter fits where every module that it changes is there in its shape; the first that is not is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from scumble.errors import Incompatible
from scumble_registry import Registry
from scumble_registry.compatibility import (
    BaseCompatibility,
    canonical_name,
    check_targets,
    has_bias,
    is_padded,
    norm_shapes,
)

TO_Q, CONV_IN = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.conv_in"


def base(**changes: Any) -> BaseCompatibility:
    plain = {"family": "sd1", "prediction_type": "epsilon", "in_channels": 4, "latent_channels": 4, "sample_size": 8}
    plain |= {"vae_scale": 8, "cross_attention_dim": 8, "text_widths": (8,)}
    return BaseCompatibility(**{**plain, "targets": {TO_Q: (4, 4), CONV_IN: (4, 4, 3, 3)}, **changes})


@pytest.fixture
def of_files(tiny_base: Path, registry: Registry) -> BaseCompatibility:
    compatibility = registry.publish(tiny_base, "tiny/base").manifest.compatibility
    assert isinstance(compatibility, BaseCompatibility)
    return compatibility


def test_norms_and_biases_are_those_of_the_models(tiny_base: Path, of_files: BaseCompatibility) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    modules = {
        canonical_name(f"{component}.{name}"): module
        for component, model in models.items()
        for name, module in model.named_modules()
    }
    norms = {
        name: tuple(module.weight.shape)
        for name, module in modules.items()
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm)
    }
    assert norm_shapes(of_files) == norms
    for name in of_files.targets:
        assert has_bias(name) == (modules[name].bias is not None), name


def test_what_fits_says_nothing() -> None:
    check_targets({TO_Q: (4, 4)}, base())
    check_targets({TO_Q: (4, 4, 1, 1)}, base())  # SD 1's and SD 2's projections differ in nothing else
    check_targets({TO_Q.removesuffix("attn1.to_q") + "norm1": (4,)}, base())


@pytest.mark.parametrize(
    ("requires", "target", "says"),
    [
        ({TO_Q: (4, 5), "unet.a": (1, 1)}, "unet.a", "which this sd1 base does not have"),
        ({TO_Q: (4, 5)}, TO_Q, "as 4x5, but in this sd1 base it is 4x4"),
        ({CONV_IN: (4, 4, 1, 1)}, CONV_IN, "4x4x1x1"),
    ],
)
def test_the_first_that_does_not_fit_is_named_with_both_shapes(
    requires: dict[str, tuple[int, ...]], target: str, says: str
) -> None:
    with pytest.raises(Incompatible, match=says) as refused:
        check_targets(requires, base())
    assert refused.value.fields["target"] == target
    assert refused.value.fields["adapter_shape"] == requires[target]


def test_a_change_of_four_channels_fits_an_inpainting_base_but_not_the_other_way_round() -> None:
    inpainting = base(in_channels=9, targets={CONV_IN: (4, 9, 3, 3)})
    check_targets({CONV_IN: (4, 4, 3, 3)}, inpainting)
    assert is_padded(CONV_IN, {CONV_IN: (4, 4, 3, 3)}, inpainting)
    assert not is_padded(CONV_IN, {CONV_IN: (4, 4, 3, 3)}, base())
    with pytest.raises(Incompatible):
        check_targets({CONV_IN: (4, 9, 3, 3)}, base())
