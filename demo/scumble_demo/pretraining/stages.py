"""Connects the stages: each reads its inputs from the work folder, trains, and writes its result there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTokenizer

from scumble.errors import NotFound
from scumble_demo.emoji.concepts import BASE_STYLES, HELD_OUT_STYLES, STYLES, base_concepts, concepts
from scumble_demo.emoji.extras import Extras, load_extras, render_extras, save_extras
from scumble_demo.emoji.gallery import Gallery, load_gallery, render_gallery, save_gallery
from scumble_demo.emoji.packages import fetch_packages
from scumble_demo.pretraining import workers
from scumble_demo.pretraining.cache import build_cache
from scumble_demo.pretraining.checkpoint import read_mean
from scumble_demo.pretraining.clip import ClipStage, all_captions
from scumble_demo.pretraining.draw import Drawing
from scumble_demo.pretraining.export import BaseModels, load_parts, pipeline_of
from scumble_demo.pretraining.loop import copy_into, run_stage
from scumble_demo.pretraining.recipe import Recipe
from scumble_demo.pretraining.scorer_stage import ScorerStage
from scumble_demo.pretraining.soften import soften
from scumble_demo.pretraining.tokenizer import train_tokenizer
from scumble_demo.pretraining.towers import Clip, new_image_encoder, new_text_encoder
from scumble_demo.pretraining.unet import UnetStage, new_unet
from scumble_demo.pretraining.unseen import unseen_pairs
from scumble_demo.pretraining.vae import VaeStage, latent_statistics, new_vae, to_model
from scumble_demo.scorer import ScorerNet

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Workshop:
    """Folders and settings of a run.

    `start` is a base's folder whose weights the stages start from, instead of random ones.
    """

    folder: Path
    recipe: Recipe
    device: torch.device
    start: Path | None = None

    def gallery(self) -> Gallery:
        gallery = load_gallery(self.folder / "gallery")
        if gallery is None:
            raise NotFound(f"no pictures in {self.folder}; run the stage `data` first", stage="data")
        return gallery

    def extras(self) -> Extras:
        extras = load_extras(self.folder / "gallery")
        if extras is None:
            raise NotFound(f"no extra pictures in {self.folder}; run the stage `data` first", stage="data")
        return extras


def prepare_data(shop: Workshop, packages: Path) -> Gallery:
    """Fetch the npm packages and render them, unless that is done already."""
    gallery = load_gallery(shop.folder / "gallery")
    if gallery is None:
        modules = fetch_packages(packages)
        gallery = render_gallery(modules)
        save_extras(render_extras(modules), shop.folder / "gallery")
        save_gallery(gallery, shop.folder / "gallery")
    return gallery


def tokenizer_of(shop: Workshop) -> CLIPTokenizer:
    """Return the run's tokenizer: the starting base's, or one trained on all captions."""
    folder = shop.folder / "tokenizer"
    if not folder.is_dir():
        tokenizer = (
            load_parts(shop.start).tokenizer
            if shop.start
            else train_tokenizer(text for row in all_captions(shop.gallery()) for texts in row for text in texts)
        )
        tokenizer.save_pretrained(folder)
    loaded: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return loaded


def vae_pictures(gallery: Gallery, concept_share: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the VAE's training pictures (base styles without held-out concepts) and its validation pictures."""
    order = concepts()
    base = [STYLES.index(style) for style in BASE_STYLES]
    known = [order.index(concept) for concept in base_concepts()]
    new = [row for row, concept in enumerate(order) if concept.held_out][:5]
    foreign = [STYLES.index(style) for style in HELD_OUT_STYLES]
    pictures = np.asarray(gallery.pictures)
    shape = (-1, *pictures.shape[2:])
    of_concepts = pictures[known][:, base].reshape(shape)
    of_others = pictures[len(order) :][:, base].reshape(shape)
    learnt = np.concatenate([of_concepts] * concept_share + [of_others])
    held_out = [pictures[new][:, base].reshape(shape), pictures[known[::24]][:, foreign].reshape(shape)]
    return learnt, np.concatenate(held_out)


def train_vae(shop: Workshop) -> dict[str, float]:
    recipe = shop.recipe
    learnt, held_out = vae_pictures(shop.gallery(), recipe.concept_share)
    torch.manual_seed(recipe.seed)
    vae = load_parts(shop.start).vae if shop.start else new_vae(recipe.vae_channels, learnt.shape[1])
    stage = VaeStage(
        vae,
        learnt,
        held_out,
        seed=recipe.seed,
        steps=recipe.vae.steps,
        device=shop.device,
        batch=_share(recipe.vae_batch),
    )
    return run_stage(stage, recipe.vae, shop.folder / "vae")


def trained_vae(shop: Workshop) -> AutoencoderKL:
    """Return the trained VAE with its scaling factor, measured on the base's pictures."""
    gallery = shop.gallery()
    vae = new_vae(shop.recipe.vae_channels, gallery.pictures.shape[2])
    _load(vae, shop, "vae")
    vae.to(shop.device, memory_format=torch.channels_last)
    pictures, _ = vae_pictures(gallery, 1)
    known = pictures[: len(base_concepts()) * len(BASE_STYLES)]
    vae.register_to_config(scaling_factor=round(latent_statistics(vae, known, shop.device), 5))
    return vae


def _new_clip(tokenizer: CLIPTokenizer, gallery: Gallery) -> Clip:
    size = gallery.pictures.shape[2]
    return Clip(
        new_text_encoder(tokenizer),
        new_image_encoder(image_size=size, patch=size // 8),
        len(gallery.codes),
        len(STYLES),
    )


def train_clip(shop: Workshop) -> dict[str, float]:
    recipe, gallery = shop.recipe, shop.gallery()
    tokenizer = tokenizer_of(shop)
    torch.manual_seed(recipe.seed + 1)
    clip = _new_clip(tokenizer, gallery)
    if shop.start:
        clip.load_state_dict(_known(load_parts(shop.start).clip), strict=False)
    stage = ClipStage(
        clip,
        tokenizer,
        gallery,
        softened_pictures(shop),
        unseen_pairs(),
        seed=recipe.seed + 2,
        device=shop.device,
        batch=_share(recipe.clip_batch),
    )
    return run_stage(stage, recipe.clip, shop.folder / "clip")


def softened_pictures(shop: Workshop) -> NDArray[np.uint8]:
    """Return the softened pictures, computed by the first worker and read by all."""
    path, seed = shop.folder / "softened.npy", shop.recipe.seed
    if workers.rank() == 0:
        soften(path, lambda: frozen_vae(shop), shop.gallery(), shop.device, seed)
    workers.wait_for_all()
    return soften(path, lambda: frozen_vae(shop), shop.gallery(), shop.device, seed)


def train_scorer(shop: Workshop) -> dict[str, float]:
    recipe, gallery = shop.recipe, shop.gallery()
    torch.manual_seed(recipe.seed + 4)
    net = load_parts(shop.start).scorer if shop.start else ScorerNet(len(concepts()), len(STYLES))
    net.forget()
    stage = ScorerStage(
        net,
        gallery,
        softened_pictures(shop),
        shop.extras(),
        unseen_pairs(),
        seed=recipe.seed + 5,
        device=shop.device,
        batch=_share(recipe.scorer_batch),
    )
    return run_stage(stage, recipe.scorer, shop.folder / "scorer")


def trained_clip(shop: Workshop) -> Clip:
    clip = _new_clip(tokenizer_of(shop), shop.gallery())
    return _load(clip, shop, "clip").to(shop.device)


def new_or_started_unet(shop: Workshop) -> UNet2DConditionModel:
    if shop.start:
        return load_parts(shop.start).unet
    torch.manual_seed(shop.recipe.seed + 3)
    latent_side = shop.gallery().pictures.shape[2] // 8
    return new_unet(shop.recipe.unet_channels, shop.recipe.unet_heads, latent_side)


def train_unet(shop: Workshop) -> dict[str, float]:
    """Train the UNet with frozen VAE and text encoder."""
    recipe, gallery = shop.recipe, shop.gallery()
    vae, clip, tokenizer = frozen_vae(shop), frozen_clip(shop), tokenizer_of(shop)
    unet = new_or_started_unet(shop)
    stage = UnetStage(
        unet,
        build_cache(vae, clip.text, tokenizer, gallery, shop.device),
        seed=recipe.seed + 4,
        device=shop.device,
        draw=Drawing(pipeline_of(vae, clip, tokenizer, unet)),
        batch=_share(recipe.unet_batch),
    )
    return run_stage(stage, recipe.unet, shop.folder / "unet")


def frozen_vae(shop: Workshop) -> AutoencoderKL:
    """Return the VAE for later stages: this run's, or the starting base's if this run trained none."""
    if shop.start and not _has_run(shop, "vae"):
        return load_parts(shop.start).vae.to(shop.device).eval()
    return trained_vae(shop)


def frozen_clip(shop: Workshop) -> Clip:
    """Return the CLIP for later stages: this run's, or the starting base's."""
    if shop.start and not _has_run(shop, "clip"):
        return load_parts(shop.start).clip.to(shop.device).eval()
    return trained_clip(shop)


def trained_scorer(shop: Workshop) -> ScorerNet:
    """Return the trained scorer, with the renderings that it stores."""
    net = _load(ScorerNet(len(concepts()), len(STYLES)), shop, "scorer")
    gallery = shop.gallery()
    hidden = {(pair.row, pair.style) for pair in unseen_pairs()}
    places = [(r, s) for r in range(len(concepts())) for s in range(len(STYLES)) if (r, s) not in hidden]
    pictures = gallery.pictures[[row for row, _ in places], [style for _, style in places]]
    net.remember(to_model(pictures, torch.device("cpu")), torch.tensor([style for _, style in places]))
    return net


def trained_parts(shop: Workshop) -> BaseModels:
    """Return all parts of the base: of each stage this run's result, else the starting base's."""
    start = load_parts(shop.start) if shop.start else None
    unet = start.unet if start else new_or_started_unet(shop)
    return BaseModels(
        vae=frozen_vae(shop),
        clip=frozen_clip(shop),
        tokenizer=tokenizer_of(shop),
        unet=_load(unet, shop, "unet") if not start or _has_run(shop, "unet") else unet,
        scorer=start.scorer if start and not _has_run(shop, "scorer") else trained_scorer(shop),
    )


def _share(batch: int) -> int:
    """Return one worker's share of a batch."""
    return max(1, batch // workers.count())


def _has_run(shop: Workshop, stage: str) -> bool:
    return (shop.folder / stage / "checkpoint.pt").is_file()


def _known(module: nn.Module) -> dict[str, Tensor]:
    """Return CLIP's parts for the base, without the auxiliary heads."""
    return {name: value for name, value in module.state_dict().items() if "_head." not in name}


def _load(module: Module, shop: Workshop, stage: str) -> Module:
    """Load the stage's EMA weights and freeze them. Raises NotFound if the stage has not run."""
    mean = read_mean(shop.folder / stage / "checkpoint.pt")
    if mean is None:
        raise NotFound(f"stage {stage!r} has no checkpoint in {shop.folder}; run it first", stage=stage)
    copy_into(module, mean)
    return module.eval().requires_grad_(False)
