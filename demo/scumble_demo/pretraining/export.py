"""Writes the base in half precision as a folder that `StableDiffusionPipeline.from_pretrained` loads."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from scumble.errors import NotFound
from scumble.files import work_folder
from scumble_demo.emoji.concepts import STYLES, concepts
from scumble_demo.pretraining.scheduler import new_scheduler
from scumble_demo.pretraining.towers import Clip, new_image_processor
from scumble_demo.scorer import SCORER_FILE, Scorer, ScorerNet

PROJECTION_FILE = "scorer/text_projection.safetensors"


@dataclass(frozen=True, slots=True)
class BaseModels:
    """All models of a base, with its scorer."""

    vae: AutoencoderKL
    clip: Clip
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scorer: ScorerNet


def pipeline_of(
    vae: AutoencoderKL, clip: Clip, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Return the parts as an SD 1.5 pipeline, with the vision tower as image encoder."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip.text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=new_image_processor(clip.image_size),
        image_encoder=clip.vision,
        requires_safety_checker=False,
    )


def export_base(out: Path, parts: BaseModels) -> None:
    """Replace the weights in `out` by these, as fp16 safetensors; other files there stay.

    The folder is written beside it first, so no file is ever incomplete, but for a moment it has parts of two bases.
    """
    with work_folder(out.parent, f".{out.name}-") as draft:
        _write_folder(draft, parts)
        out.mkdir(parents=True, exist_ok=True)
        for part in draft.iterdir():
            target = out / part.name
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)


def _write_folder(draft: Path, parts: BaseModels) -> None:
    pipeline_of(parts.vae, parts.clip, parts.tokenizer, parts.unet).save_pretrained(draft, safe_serialization=True)
    (draft / SCORER_FILE).parent.mkdir()
    save_file({name: value.contiguous() for name, value in parts.scorer.state_dict().items()}, draft / SCORER_FILE)
    save_file(
        {name: value for name, value in parts.clip.state_dict().items() if _is_projection(name)},
        draft / PROJECTION_FILE,
    )
    for weights in draft.rglob("*.safetensors"):
        _halve(weights)


def load_parts(folder: Path) -> BaseModels:
    """Read such a folder in float32, to train or to measure."""
    if not (folder / "model_index.json").is_file():
        raise NotFound(f"{folder} has no base: there is no model_index.json", path=str(folder))
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    clip = Clip(pipe.text_encoder, pipe.image_encoder, classes=len(concepts()), styles=len(STYLES))
    projection = {name: value.float() for name, value in load_file(folder / PROJECTION_FILE).items()}
    clip.load_state_dict(projection, strict=False)
    return BaseModels(pipe.vae, clip, pipe.tokenizer, pipe.unet, Scorer.load(folder).net)


def _is_projection(name: str) -> bool:
    return name.startswith(("text_projection", "log_scale"))


def _halve(path: Path) -> None:
    """Convert a file's float32 weights to float16. Raises an error for values that do not fit."""
    tensors = load_file(path)
    halved = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    if not all(bool(torch.isfinite(value).all()) for value in halved.values()):
        raise ValueError(f"{path.name} does not fit half precision")
    save_file(halved, path, metadata={"format": "pt"})
