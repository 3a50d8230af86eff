"""LoRA factors on a frozen pipeline: put in by PEFT, switched, and saved in the diffusers/PEFT layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from scumble_trainers.methods.lora.settings import LoraSettings, StoredType
from scumble_trainers.parent import Pipeline

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_FEED_FORWARD = ("fc1", "fc2")

FILE = "pytorch_lora_weights.safetensors"
_DTYPES: dict[StoredType, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}


def add_factors(pipeline: Pipeline, settings: LoraSettings) -> None:
    """Puts rank-r factors beside the chosen layers: A by Kaiming from the seed, B zero, so nothing changes yet."""
    torch.manual_seed(settings.seed)
    feed_forward = settings.feed_forward
    pipeline.unet.add_adapter(_lora(settings, ATTENTION + (FEED_FORWARD if feed_forward else ())))
    if settings.text_encoder:
        text = TEXT_ATTENTION + (TEXT_FEED_FORWARD if feed_forward else ())
        pipeline.text_encoder.add_adapter(_lora(settings, text))
    for part in (pipeline.unet, pipeline.text_encoder):
        _in_fp32(part)


def _in_fp32(module: nn.Module) -> None:
    """Factors are trained in fp32 whatever the frozen weights are kept in."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def factors(pipeline: Pipeline) -> dict[str, nn.Parameter]:
    """All trainable parameters by name: `unet.…` first, then `text_encoder.…`."""
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return {
        f"{part}.{name}": parameter
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@contextmanager
def weight_zero(pipeline: Pipeline) -> Iterator[None]:
    """Within, the pipeline is the base alone."""
    adapted = [part for part in (pipeline.unet, pipeline.text_encoder) if hasattr(part, "peft_config")]
    for part in adapted:
        part.disable_adapters()
    try:
        yield
    finally:
        for part in adapted:
            part.enable_adapters()


def save_factors(pipeline: Pipeline, folder: Path, dtype: StoredType) -> Path:
    """Writes `folder/pytorch_lora_weights.safetensors` with alpha in its header, as diffusers saves and loads it."""
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    text = hasattr(text_encoder, "peft_config")
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=_stored(get_peft_model_state_dict(unet), dtype),
        unet_lora_adapter_metadata=_metadata(unet),
        text_encoder_lora_layers=_stored(_text_names(text_encoder), dtype) if text else None,
        text_encoder_lora_adapter_metadata=_metadata(text_encoder) if text else None,
    )
    _order_header(folder / FILE)
    return folder / FILE


def _order_header(file: Path) -> None:
    """The same tensors and metadata, the header's keys in order: safetensors writes them in a random one.

    Layout: 8 bytes little-endian length, the JSON header padded with spaces, the tensors' bytes.
    """
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    ordered = file.with_suffix(".partial")
    ordered.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])
    ordered.replace(file)


def _lora(settings: LoraSettings, targets: tuple[str, ...]) -> LoraConfig:
    alpha = settings.scale_alpha
    # PEFT types alpha as an integer; it only divides by the rank, and takes fractions as well.
    whole = int(alpha) if alpha == int(alpha) else cast(int, alpha)
    return LoraConfig(r=settings.rank, lora_alpha=whole, target_modules=list(targets))


def _text_names(text_encoder: nn.Module) -> dict[str, Tensor]:
    """Files say `text_model.`; since transformers 5.6 CLIPTextModel itself does not."""
    state = get_peft_model_state_dict(text_encoder)
    return {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in state.items()}


def _stored(state: dict[str, Tensor], dtype: StoredType) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", _DTYPES[dtype]).contiguous() for name, value in state.items()}


def _metadata(module: Any) -> dict[str, Any]:
    """PEFT's configuration with its sets in order, so that the same run writes the same bytes."""
    config: dict[str, Any] = module.peft_config["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
