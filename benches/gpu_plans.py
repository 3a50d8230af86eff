"""The bases that `gpu.py` measures, with random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from engines import random_models
from memory import FAMILIES, FamilyConfigs

from scumble_build.graphs.families import FAMILIES as OURS
from scumble_build.graphs.models import Models
from support.tiny_sd import make_tiny_base

UNET_PARAMETERS = {"sd1.5": 859_520_964, "sdxl": 2_567_463_684}


@dataclass(frozen=True)
class Plan:
    """A base to measure: `latents` is the side of a square; `context` the width of text states."""

    name: str
    models: Callable[[], Models]
    family: str
    latents: int
    context: int
    steps: int
    images: int
    aim_traffic: float
    unet_bytes: int = 0
    """In half precision."""


def real_plan(name: str, aim: float) -> Plan:
    family: FamilyConfigs = FAMILIES[name]
    ours = {"sd1.5": "sd1", "sdxl": "sdxl"}[name]
    models, width = partial(random_models, family, name), family.unet["cross_attention_dim"]
    return Plan(name, models, ours, family.latents, width, 20, 4, aim, 2 * UNET_PARAMETERS[name])


def tiny_plan() -> Plan:
    def models() -> Models:
        with tempfile.TemporaryDirectory(prefix="scumble-tiny-") as folder:
            return Models.load(make_tiny_base(Path(folder) / "base"), OURS["sd1"], torch.float32)

    return Plan("tiny", models, "sd1", 8, 32, 2, 2, 1.0)
