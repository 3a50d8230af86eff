"""The torch executor: the graphs of `scumble_build` in eager PyTorch, on a CPU or a CUDA device."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from scumble.errors import Refused, Unavailable
from scumble_build.adapted import Adapted, Factors
from scumble_build.denoiser import Denoiser, KVProjection
from scumble_build.inputs import StepInputs
from scumble_build.text import Overrides, TextEncoder
from scumble_registry.formats.dreambooth import plain
from scumble_server.executors import Changed

Model = TypeVar("Model", bound=torch.nn.Module)
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Models:
    """The networks of one SD 1.x base, before adapters' inputs are taken out of them."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> Models:
        """A folder in the diffusers layout."""
        return cls(
            UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, local_files_only=True),
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True),
            AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype, local_files_only=True),
        )


class TorchExecutor:
    """Owns one set of weights, which it only ever reads."""

    def __init__(self, models: Models, device: torch.device, dtype: torch.dtype, max_rows: int) -> None:
        """`models` are in `dtype` already."""
        self._device, self._dtype, self.max_rows = device, dtype, max_rows
        unet, text = self._place(models.unet), self._place(models.text_encoder)
        self._vae: Any = self._place(models.vae)
        # As their files name them: behind this, names gain what adapters need.
        self._states = {
            "unet": dict(unet.state_dict()),
            "text_encoder": dict(text.state_dict()),
            "vae": dict(self._vae.state_dict()),
        }
        self._configs = {"unet": unet.config, "text_encoder": text.config, "vae": self._vae.config}
        self._projection = KVProjection(unet)
        self._denoiser = Denoiser(unet, self._projection.slices)
        self._text = TextEncoder(text)
        self.step_layout = self._denoiser.layout
        self.kv_layout = self._projection.layout
        self.kv_slices = self._projection.slices
        self.text_layout = self._text.layout
        self.text_layers = self._text.layers
        graphs = (self._denoiser, self._projection, self._text)
        self._adapted = {
            layer.target.name: layer for graph in graphs for layer in graph.modules() if isinstance(layer, Adapted)
        }

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", precision: str = "fp32", max_rows: int = 32) -> Self:
        """A folder in the diffusers layout. Raises Unavailable if the device is not there."""
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("device cuda was asked for, but torch sees no CUDA device; use --device cpu")
        return cls(Models.load(folder, _DTYPES[precision]), torch.device(device), _DTYPES[precision], max_rows)

    def variant(self, changed: Changed, configs: Path | None = None) -> Self:
        states = {component: dict(state) for component, state in self._states.items()}
        for component, tensors in changed.items():
            if component not in states:
                continue  # a safety checker, an image encoder: nothing that is drawn with
            names = {plain(name): name for name in states[component]}
            for name, values in tensors.items():
                if plain(name) not in names:
                    raise Refused(
                        f"the checkpoint's {component}.{name} has no place in the base; "
                        "save it again with a current diffusers",
                        tensor=name,
                    )
                states[component][names[plain(name)]] = values.to(self._device, self._dtype)
        models = Models(
            _build(UNet2DConditionModel, self._config("unet", configs), states["unet"]),
            _build_text(self._configs["text_encoder"], states["text_encoder"]),
            _build(AutoencoderKL, self._config("vae", configs), states["vae"]),
        )
        return type(self)(models, self._device, self._dtype, self.max_rows)

    def _config(self, component: str, configs: Path | None) -> Any:
        """A checkpoint's own: scaling and the like may differ, though its shapes do not."""
        if configs is None:
            return self._configs[component]
        return json.loads((configs / component / "config.json").read_text())

    def _place(self, model: Model) -> Model:
        return model.to(self._device).eval().requires_grad_(False)

    @property
    def device(self) -> str:
        return str(self._device)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @torch.inference_mode()
    def encode(
        self, tokens: Tensor, factors: Factors | None, overrides: Overrides | None = None, clip_skip: int = 0
    ) -> Tensor:
        if overrides is not None:
            overrides = Overrides(
                overrides.vectors.to(self._device, self._dtype),
                overrides.row.to(self._device),
                overrides.position.to(self._device),
            )
        states: Tensor = self._text(tokens.to(self._device), self._cast(factors), overrides, clip_skip)
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
        weight: Tensor = self._adapted[target].base.weight
        return weight

    def weights_digest(self) -> str:
        digest = hashlib.sha256()
        for state in self._states.values():
            for _, tensor in sorted(state.items()):
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, str]:
        precision = next(name for name, dtype in _DTYPES.items() if dtype == self._dtype)
        return {"executor": "torch", "device": self.device, "precision": precision}


def _build(kind: Any, config: Any, state: dict[str, Tensor]) -> Any:
    """A diffusers model around weights that are there already: nothing is drawn or copied."""
    with torch.device("meta"):
        model = kind.from_config(config)
    model.load_state_dict(state, assign=True)
    return model


def _build_text(config: Any, state: dict[str, Tensor]) -> CLIPTextModel:
    """Not on the meta device, because its position ids are in no state."""
    model = CLIPTextModel(config)
    model.load_state_dict(state, assign=True)
    return model
