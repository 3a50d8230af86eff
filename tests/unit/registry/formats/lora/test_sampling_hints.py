"""Speed LoRAs are known by their names, and with them how they are to be sampled."""

from __future__ import annotations

from typing import Any

import pytest

from scumble_registry.formats.lora.sampling_hints import sampling_of


@pytest.mark.parametrize(
    ("metadata", "name", "expected"),
    [
        ({}, "lcm-lora-sdv1-5.safetensors", {"scheduler": "lcm", "steps": 4, "guidance_scale": 1.0}),
        ({}, "LCM_LoRA_Weights_SD15.safetensors", {"scheduler": "lcm", "steps": 4, "guidance_scale": 1.0}),
        (
            {},
            "sdxl_lightning_8step_lora.safetensors",
            {"scheduler": "euler", "steps": 8, "guidance_scale": 1.0, "timestep_spacing": "trailing"},
        ),
        (
            {},
            "Hyper-SDXL-8steps-CFG-lora.safetensors",
            {"scheduler": "ddim", "steps": 8, "timestep_spacing": "trailing"},
        ),
        (
            {},
            "Hyper-SD15-1step-lora.safetensors",
            {"scheduler": "tcd", "steps": 1, "guidance_scale": 1.0, "eta": 1.0},
        ),
        (
            {"ss_output_name": "TCD-SDXL-LoRA"},
            "pytorch_lora_weights.safetensors",
            {"scheduler": "tcd", "steps": 4, "guidance_scale": 1.0, "eta": 0.3},
        ),
        ({}, "dmd2_sdxl_4step_lora.safetensors", {"scheduler": "lcm", "steps": 4, "guidance_scale": 1.0}),
        ({}, "lightning-bolts-style.safetensors", None),
        ({}, "hyper_realistic.safetensors", None),
        ({}, "ink.safetensors", None),
    ],
)
def test_speed_loras_are_known_by_their_makers_names(
    metadata: dict[str, str], name: str, expected: dict[str, Any] | None
) -> None:
    found = sampling_of(metadata, name)
    assert (found.model_dump() if found is not None else None) == expected
