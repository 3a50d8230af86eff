"""Computes the UNet's training data once: latents of all pictures, hidden states of all captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from scumble_demo.emoji.captions import captions, validation_caption
from scumble_demo.emoji.concepts import BASE_STYLES, STYLES, base_concepts, concepts
from scumble_demo.emoji.gallery import Gallery
from scumble_demo.pretraining.clip import tokenize
from scumble_demo.pretraining.unet import UnetCache
from scumble_demo.pretraining.vae import to_model


@torch.no_grad()
def encode_texts(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: Sequence[str], device: torch.device
) -> Tensor:
    """Return hidden states `(n, T, D)` at full length, as in the pipeline."""
    ids = tokenize(tokenizer, list(texts), tokenizer.model_max_length)
    parts = [text_encoder(input_ids=part.to(device)).last_hidden_state.float().cpu() for part in ids.split(64)]
    return torch.cat(parts)


@torch.no_grad()
def build_cache(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    gallery: Gallery,
    device: torch.device,
) -> UnetCache:
    """Compute the cache for all base concepts in all base styles; captions are stored in half precision."""
    order = concepts()
    rows = [order.index(concept) for concept in base_concepts()]
    columns = [STYLES.index(style) for style in BASE_STYLES]
    pictures = np.concatenate([gallery.pictures[rows][:, column] for column in columns])
    latents = [vae.encode(to_model(part, device)).latent_dist.mean.float().cpu() for part in _parts(pictures)]
    pairs = [(concept, style) for style in BASE_STYLES for concept in base_concepts()]
    variants = [captions(concept, style) for concept, style in pairs]
    longest = max(len(texts) for texts in variants)
    padded = [(texts * longest)[:longest] for texts in variants]
    states = encode_texts(text_encoder, tokenizer, [text for texts in padded for text in texts], device)
    wordings = [validation_caption(concept, style) for concept, style in pairs]
    return UnetCache(
        latents=torch.cat(latents).contiguous() * vae.config.scaling_factor,
        texts=states.half().view(len(pairs), longest, *states.shape[1:]),
        wordings=encode_texts(text_encoder, tokenizer, wordings, device),
        empty=encode_texts(text_encoder, tokenizer, [""], device)[0],
    )


def _parts(pictures: np.ndarray) -> list[np.ndarray]:  # type: ignore[type-arg]
    return np.array_split(pictures, max(1, len(pictures) // 16))
