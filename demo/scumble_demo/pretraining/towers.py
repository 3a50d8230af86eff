"""The two towers of the small CLIP: a text encoder and a vision transformer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

WIDTH = 128
IMAGE_SIZE, PATCH = 128, 16


def new_text_encoder(tokenizer: CLIPTokenizer, width: int = WIDTH, layers: int = 3) -> CLIPTextModel:
    """Make the text encoder with the true special token ids: with CLIP's legacy eos id, 2, it would pool at the largest
    id.
    """
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def new_image_encoder(
    width: int = WIDTH, layers: int = 4, image_size: int = IMAGE_SIZE, patch: int = PATCH
) -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            image_size=image_size,
            patch_size=patch,
            projection_dim=WIDTH,
            dtype="float32",
        )
    )


def new_image_processor(image_size: int = IMAGE_SIZE) -> CLIPImageProcessor:
    """Return the image processor, which scales pixels to -1…1 (mean and deviation 0.5) as for the autoencoder."""
    return CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


class Clip(nn.Module):
    """Both towers, the text projection and the heads for concept and style, which are trained together."""

    def __init__(self, text: CLIPTextModel, vision: CLIPVisionModelWithProjection, classes: int, styles: int) -> None:
        super().__init__()
        self.text, self.vision = text, vision
        self.image_size = int(cast("int", vision.config.image_size))
        self.text_projection = nn.Linear(text.config.hidden_size, WIDTH, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # temperature 0.07, as in CLIP
        self.concept_head = nn.Linear(WIDTH, classes)
        self.style_head = nn.Linear(WIDTH, styles)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Embed `ids (n, T)` as unit vectors `(n, WIDTH)`."""
        pooled = self.text(input_ids=ids).pooler_output
        return functional.normalize(self.text_projection(pooled).float(), dim=-1)

    def embed_pictures(self, pixels: Tensor) -> Tensor:
        """Embed `pixels (n, 3, H, W)` in -1…1 as `(n, WIDTH)`, not normalised."""
        return cast("Tensor", self.vision(pixel_values=pixels).image_embeds).float()


def contrastive_loss(pictures: Tensor, texts: Tensor, same: Tensor, log_scale: Tensor) -> Tensor:
    """Return CLIP's loss for batches where several texts match one picture; `same (n, n)` marks matching pairs.

    The target is the uniform distribution over all matches (supervised contrastive learning, arXiv:2004.11362), in both
    directions.
    """
    logits = log_scale.exp().clamp(max=100) * functional.normalize(pictures, dim=-1) @ texts.T
    wanted = same.float() / same.float().sum(dim=1, keepdim=True)
    return 0.5 * (functional.cross_entropy(logits, wanted) + functional.cross_entropy(logits.T, wanted))
