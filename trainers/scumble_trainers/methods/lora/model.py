"""LoRA factors on a frozen pipeline: put in by PEFT, and saved in the diffusers/PEFT layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from scumble_trainers.method import Method, half, in_fp32
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.parent import Parent, Pipeline
from scumble_trainers.settings import StoredType

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_FEED_FORWARD = ("fc1", "fc2")

FILE = "pytorch_lora_weights.safetensors"


class Lora(Method[LoraSettings]):
    """A by Kaiming from the seed, B zero, so that nothing changes at first."""

    name = "lora"
    adapter = FILE

    def __init__(self, pipeline: Pipeline, settings: LoraSettings, parent: Parent) -> None:
        super().__init__(pipeline, settings, parent)
        further = FEED_FORWARD if settings.feed_forward else ()
        pipeline.unet.add_adapter(_lora(settings, ATTENTION + further))
        if settings.text_encoder:
            further = TEXT_FEED_FORWARD if settings.feed_forward else ()
            for encoder in self.text.encoders:
                cast(Any, encoder).add_adapter(_lora(settings, TEXT_ATTENTION + further))
        in_fp32([pipeline.unet, self.text])

    @property
    def trains_text(self) -> bool:
        return self.settings.text_encoder

    def trained(self) -> dict[str, nn.Parameter]:
        """`unet.…` first, then `text.…`."""
        parts = {"unet": self.unet, "text": self.text}
        return {
            f"{part}.{name}": parameter
            for part, module in parts.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def learning_rate(self, name: str) -> float:
        if name.startswith("text"):
            return self.settings.text_learning_rate or self.settings.learning_rate
        return self.settings.learning_rate

    def save(self, folder: Path, dtype: StoredType) -> None:
        save_factors(self.pipeline, folder, dtype)


def save_factors(pipeline: Pipeline, folder: Path, dtype: StoredType) -> Path:
    """Writes `folder/pytorch_lora_weights.safetensors` with alpha in its header, as diffusers saves and loads it."""
    layers: dict[str, Any] = {
        "unet_lora_layers": half(get_peft_model_state_dict(pipeline.unet), dtype),
        "unet_lora_adapter_metadata": _metadata(pipeline.unet),
    }
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipeline, part, None)
        if hasattr(encoder, "peft_config"):
            layers[f"{part}_lora_layers"] = half(_text_names(encoder), dtype)
            layers[f"{part}_lora_adapter_metadata"] = _metadata(encoder)
    pipeline.save_lora_weights(folder, **layers)
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


def _text_names(text_encoder: Any) -> dict[str, Tensor]:
    """Files say `text_model.`; since transformers 5.6 CLIPTextModel itself does not."""
    state = get_peft_model_state_dict(text_encoder)
    return {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in state.items()}


def _metadata(module: Any) -> dict[str, Any]:
    """PEFT's configuration with its sets in order, so that the same run writes the same bytes."""
    config: dict[str, Any] = module.peft_config["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
