"""Writes the base as a folder that `StableDiffusionPipeline.from_pretrained` loads, in half precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from scumble.errors import NotFound
from scumble_trainers.base.scheduler import new_scheduler
from scumble_trainers.base.towers import Clip, new_image_encoder, new_image_processor, new_text_encoder

SCORER_FILE = "scorer/model.safetensors"


def pipeline_of(
    vae: AutoencoderKL, clip: Clip, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts put together as SD 1.5 is, with the vision tower as image encoder."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip.text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=new_image_processor(clip.vision.config.image_size),
        image_encoder=clip.vision,
        requires_safety_checker=False,
    )


def export_base(
    out: Path, vae: AutoencoderKL, clip: Clip, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> None:
    """Replaces the weights in `out` by these, as fp16 safetensors; other files there stay.

    The folder is written beside it first, so a reader never meets half a model.
    """
    draft = out.with_name(out.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    pipeline_of(vae, clip, tokenizer, unet).save_pretrained(draft, safe_serialization=True)
    scorer = {f"{name}": value for name, value in clip.state_dict().items() if _is_head(name)}
    (draft / SCORER_FILE).parent.mkdir()
    save_file({name: value.contiguous() for name, value in scorer.items()}, draft / SCORER_FILE)
    for weights in draft.rglob("*.safetensors"):
        _halve(weights)
    out.mkdir(parents=True, exist_ok=True)
    for part in draft.iterdir():
        target = out / part.name
        if target.is_dir():
            shutil.rmtree(target)
        part.replace(target)
    draft.rmdir()


def load_parts(folder: Path) -> tuple[AutoencoderKL, Clip, CLIPTokenizer, UNet2DConditionModel]:
    """Reads such a folder back, in float32: to train on, or to measure."""
    if not (folder / "model_index.json").is_file():
        raise NotFound(f"{folder} holds no base: there is no model_index.json", path=str(folder))
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    heads = load_file(folder / SCORER_FILE)
    clip = Clip(pipe.text_encoder, pipe.image_encoder, *_head_sizes(heads))
    clip.load_state_dict({name: value.float() for name, value in heads.items()}, strict=False)
    return pipe.vae, clip, pipe.tokenizer, pipe.unet


def new_clip(tokenizer: CLIPTokenizer, concepts: int, styles: int) -> Clip:
    return Clip(new_text_encoder(tokenizer), new_image_encoder(), concepts, styles)


def _is_head(name: str) -> bool:
    return not name.startswith(("text.", "vision."))


def _head_sizes(heads: dict[str, torch.Tensor]) -> tuple[int, int]:
    return len(heads["concept_head.weight"]), len(heads["style_head.weight"])


def _halve(path: Path) -> None:
    """Stores float32 weights as float16; what is too large for it would be caught here."""
    tensors = load_file(path)
    halved = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    if not all(bool(torch.isfinite(value).all()) for value in halved.values()):
        raise ValueError(f"{path.name} does not fit half precision")
    save_file(halved, path, metadata={"format": "pt"})


def folder_digest_inputs(folder: Path) -> list[str]:
    """The relative paths of all weights, for a report of sizes."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))


def write_json(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
