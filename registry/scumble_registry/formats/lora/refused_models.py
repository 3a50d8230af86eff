"""Related algorithms that are recognised by their keys but cannot be served: they are refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

_REFUSED = (
    (r"lora_prior_(unet|te)_", "Stable Cascade's, a family that is not served"),
    (
        r"^lora_transformer_|^transformer\.|(double|single|joint)_(transformer_)?blocks|^lora_te3_|^diffusion_model\.layers",
        "a diffusion transformer's (Flux, SD3, PixArt and their like), a family that is not served",
    ),
    (
        r"motion_modules|temporal_transformer|temporal_res_block",
        "a video model's (AnimateDiff, SVD), which is not served",
    ),
    (r"^(unet|text_encoder):\d+:", "in the first LoRA tool's layout, which numbers its modules instead of naming them"),
    (
        r"\.(lambda_layer|[qp]_layer\.weight)$",
        "T-LoRA's, which changes with the timestep and needs values that are in no file",
    ),
    (r"\.vera_|^base_model\.vera_", "VeRA's, which is not served"),
    (r"\.fourierft_", "FourierFT's, which is not served"),
    (r"\.hra_", "HRA's, which is not served"),
    (r"\.(lora_embedding_[AB]|token_embedding|position_embedding)", "of an embedding table, which is not served"),
    (
        r"^bundle_emb\.",
        "embeddings bundled with the LoRA; publish each as an embedding of its own, and the LoRA without them",
    ),
    (r"\.set_weight$", "weights that replace the base's instead of changing them; publish a checkpoint"),
    (r"\.bias_(indices|values|size)$", "a sparse remainder of an extraction, which is not served"),
    (r"^lllite_", "a ControlNet-LLLite's"),
    (r"modules_to_save|\.original_module\.", "whole layers that PEFT saved beside the adapter, which are not served"),
)


def refused_model(keys: Iterable[str]) -> str | None:
    """Return what these keys are, as the end of a sentence that begins with "They are"; None if unknown."""
    keys = list(keys)
    for pattern, kind in _REFUSED:
        if any(re.search(pattern, key) for key in keys):
            return kind
    return None
