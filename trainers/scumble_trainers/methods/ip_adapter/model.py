"""Trains the picture's key and value projections in every cross-attention, and the projection to tokens. The UNet is
frozen.

The modules are diffusers' own, so training runs the same code as its pipelines.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from scumble_trainers.base import Pipeline, TrainingBase
from scumble_trainers.data.dataset import Example
from scumble_trainers.data.vision import PictureStates, Reads, encoder_folder
from scumble_trainers.method import Condition, Material, TrainingMethod, half
from scumble_trainers.methods.ip_adapter.layout import projection_tensors
from scumble_trainers.methods.ip_adapter.settings import IpAdapterSettings
from scumble_trainers.progress import ProgressReport
from scumble_trainers.results.sampling import Samples, draw_samples
from scumble_trainers.settings import StoredType

FILE = "ip-adapter.safetensors"
BASE_TOKENS = 4  # loaders assume this for the base kind
HEAD, DEPTH = 64, 4  # of the resampler; loaders assume these too


class IpAdapterTraining(TrainingMethod[IpAdapterSettings]):
    """Keys and values start as copies of the text's (as in tencent-ailab/IP-Adapter), the projection from the seed."""

    name = "ip_adapter"

    def __init__(self, pipeline: Pipeline, settings: IpAdapterSettings, base: TrainingBase) -> None:
        super().__init__(pipeline, settings, base)
        self.adapter = "ip_adapter" if settings.image_encoder else FILE
        reads: Reads = "embedding" if settings.variant == "base" else "states"
        self.seen = PictureStates(base, settings.image_encoder, reads, pipeline.unet.device)
        self.nothing = self.seen.nothing()
        self.tokens = BASE_TOKENS if settings.variant == "base" else settings.tokens
        self.projection = self._projection().to(self.device)
        self.layers: dict[int, Any] = (
            self._add_layers()
        )  # first: the resampler's attentions count as the UNet's, once in
        self.unet.encoder_hid_proj = MultiIPAdapterImageProjection([self.projection])
        self.unet.config.encoder_hid_dim_type = "ip_image_proj"

    @classmethod
    def check(cls, settings: IpAdapterSettings, base: TrainingBase, examples: Sequence[Example]) -> None:  # noqa: ARG003
        encoder_folder(base, settings.image_encoder)

    def begin(self, material: Material, device: torch.device, report: ProgressReport) -> None:
        super().begin(material, device, report)
        self.seen.read(material.examples, report)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return `projection.…`, then `INDEX.to_k_ip.…` and `INDEX.to_v_ip.…`, numbered as in files."""
        trained = {f"projection.{name}": value for name, value in self.projection.named_parameters()}
        for index, layer in self.layers.items():
            trained |= {f"{index}.{name}": value for name, value in layer.named_parameters()}
        return trained

    def predict(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        seen = self.seen.of(condition.pictures)
        if condition.chances is not None:
            dropped = condition.chances[:, 0].to(self.device) < self.settings.image_dropout
            seen = torch.where(dropped.view(-1, *[1] * (seen.dim() - 1)), self.nothing.to(seen), seen)
        return self.denoise(condition, noisy, timesteps, added_cond_kwargs={"image_embeds": [seen[:, None]]})

    @contextmanager
    def as_base(self) -> Iterator[None]:
        for layer in self.layers.values():
            layer.scale = [0.0]
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.scale = [1.0]

    def draw(self, samples: Samples) -> list[Image.Image]:
        """Draw each row with a held-out picture, in the order of their captions if those are the prompts."""
        material = self.material
        among = material.held if len(material.held) else material.trained
        pictures = among[torch.arange(len(samples.prompts)) % len(among)]
        seen = self.seen.of(pictures)[:, None]
        nothing = self.nothing.to(seen).expand_as(seen[:, 0])[:, None]
        guided = samples.guidance > 1
        return draw_samples(
            self.pipeline, samples, ip_adapter_image_embeds=[torch.cat([nothing, seen]) if guided else seen]
        )

    def save(self, folder: Path, dtype: StoredType) -> None:
        """Save the adapter, with the vision tower if that is not the base's."""
        tensors = projection_tensors(self.projection.state_dict())
        for index, layer in self.layers.items():
            for role in ("to_k_ip", "to_v_ip"):
                tensors[f"ip_adapter.{index}.{role}.weight"] = getattr(layer, role)[0].weight
        given = self.settings.image_encoder
        if given is None:
            save_file(half(tensors, dtype), folder / FILE)
            return
        (folder / self.adapter).mkdir(exist_ok=True)
        save_file(half(tensors, dtype), folder / self.adapter / FILE)
        shutil.copytree(given, folder / self.adapter / "image_encoder", dirs_exist_ok=True)

    def _projection(self) -> nn.Module:
        context, width = int(self.unet.config.cross_attention_dim), self.nothing.shape[-1]
        if self.settings.variant == "base":
            base: nn.Module = ImageProjection(width, context, BASE_TOKENS)
            return base
        inner = self.settings.width or -(-width // HEAD) * HEAD
        plus: nn.Module = IPAdapterPlusImageProjection(
            embed_dims=width,
            output_dims=context,
            hidden_dims=inner,
            depth=DEPTH,
            dim_head=HEAD,
            heads=inner // HEAD,
            num_queries=self.tokens,
        )
        return plus

    def _add_layers(self) -> dict[int, Any]:
        """Return the processors of all cross-attentions by their index among all attentions."""
        processors = dict(self.unet.attn_processors)
        layers: dict[int, Any] = {}
        for index, name in enumerate(processors):
            attention = self.unet.get_submodule(name.removesuffix(".processor"))
            if name.endswith("attn1.processor"):
                continue
            hidden, context = attention.to_k.weight.shape
            layer: Any = IPAdapterAttnProcessor2_0(hidden, context, num_tokens=[self.tokens], scale=1.0)
            layer.to_k_ip[0].weight.data.copy_(attention.to_k.weight)
            layer.to_v_ip[0].weight.data.copy_(attention.to_v.weight)
            processors[name] = layers[index] = layer.to(self.device)
        self.unet.set_attn_processor(processors)
        return layers
