"""The torch executor: the graphs of `scumble_build` in eager PyTorch, on a CPU or a CUDA device."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from scumble.errors import Unavailable
from scumble_build.adapted import Adapted, Factors
from scumble_build.denoiser import Denoiser, KVProjection
from scumble_build.inputs import StepInputs
from scumble_build.text import Overrides, TextEncoder

Model = TypeVar("Model", bound=torch.nn.Module)
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchExecutor:
    """Owns one base's weights, which it only ever reads."""

    def __init__(self, folder: Path, device: str = "cpu", precision: str = "fp32", max_rows: int = 32) -> None:
        """Load a diffusers-layout SD 1.x folder. Raises Unavailable if the device is not there."""
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("device cuda was asked for, but torch sees no CUDA device; use --device cpu")
        self._device, self._precision = torch.device(device), precision
        self._dtype = _DTYPES[precision]
        self.max_rows = max_rows
        unet = self._place(UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True))
        text = self._place(CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True))
        self._vae = self._place(AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True))
        self._models = (unet, text, self._vae)
        self._projection = KVProjection(unet)
        self._denoiser = Denoiser(unet, self._projection.slices)
        self._text = TextEncoder(text)
        self.step_layout = self._denoiser.layout
        self.kv_layout = self._projection.layout
        self.kv_slices = self._projection.slices
        self.text_layout = self._text.layout
        graphs = (self._denoiser, self._projection, self._text)
        self._adapted = {
            layer.target.name: layer for graph in graphs for layer in graph.modules() if isinstance(layer, Adapted)
        }

    def _place(self, model: Model) -> Model:
        return model.to(self._device, self._dtype).eval().requires_grad_(False)

    @property
    def device(self) -> str:
        return str(self._device)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @torch.inference_mode()
    def encode(self, tokens: Tensor, factors: Factors | None, overrides: Overrides | None = None) -> Tensor:
        if overrides is not None:
            overrides = Overrides(
                overrides.vectors.to(self._device, self._dtype),
                overrides.row.to(self._device),
                overrides.position.to(self._device),
            )
        states: Tensor = self._text(tokens.to(self._device), self._cast(factors), overrides)
        return states

    @torch.inference_mode()
    def project(self, states: Tensor, factors: Factors | None, of_values: Tensor | None = None) -> Tensor:
        kv: Tensor = self._projection(states, self._cast(factors), of_values)
        return kv

    @torch.inference_mode()
    def denoise(self, sample: Tensor, timestep: Tensor, inputs: StepInputs) -> Tensor:
        inputs = inputs.to(self._device, self._dtype)
        prediction: Tensor = self._denoiser(sample.to(self._dtype), timestep, inputs)
        return prediction.float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self._dtype) / self._vae.config.scaling_factor
        decoded: Tensor = self._vae.decode(latents, return_dict=False)[0].float()
        pixels = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
        return pixels.round().to(torch.uint8).cpu()

    def _cast(self, factors: Factors | None) -> Factors | None:
        return factors.to(self._device, self._dtype) if factors is not None else None

    def weight(self, target: str) -> Tensor:
        return self._adapted[target].base.weight

    def weights_digest(self) -> str:
        digest = hashlib.sha256()
        for model in self._models:
            for _, tensor in sorted(model.state_dict().items()):
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, str]:
        return {"executor": "torch", "device": self.device, "precision": self._precision}
