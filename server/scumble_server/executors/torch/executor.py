"""The torch executor: the graphs of `scumble_build` in eager PyTorch, on a CPU or a CUDA device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from scumble.errors import Refused, Unavailable
from scumble_build.export.graph import PRECISIONS
from scumble_build.export.manifest import Precision
from scumble_build.export.plan import BaseGraphs
from scumble_build.graphs.adapted import Factors
from scumble_build.graphs.denoiser import Denoiser
from scumble_build.graphs.families import Family
from scumble_build.graphs.includes import Include
from scumble_build.graphs.inputs import StepInputs
from scumble_build.graphs.models import Models, TextModel, load_autoencoder, text_class, vae_dtype
from scumble_build.graphs.text import EncodedText, TextInputs
from scumble_registry import Version
from scumble_registry.formats.dreambooth import plain
from scumble_registry.formats.safetensors_header import read_header
from scumble_server.executors.cuda import choose_kernels_by_time, memory_format
from scumble_server.executors.device import Captured, Stepping, faults
from scumble_server.executors.limits import GraphLimits
from scumble_server.executors.padding import Padding, Step
from scumble_server.executors.protocol import Changed, NetModel, Nets
from scumble_server.executors.torch.compiling import check_compiler, compiled
from scumble_server.executors.torch.kernel import FusedKernel, choose_kernel
from scumble_server.executors.torch.net import torch_nets
from scumble_server.executors.torch.vae import TorchVae

Model = TypeVar("Model", bound=torch.nn.Module)
PRECISION_OF: dict[torch.dtype, Precision] = {dtype: name for name, dtype in PRECISIONS.items()}


class TorchExecutor:
    """Owns one set of weights, which it never changes. On CUDA its steps are captured as graphs."""

    most_pages: tuple[int | None, int | None] = (None, None)
    limits: tuple[GraphLimits, ...] = ()
    copies = 1
    changes_graphs = True

    def __init__(
        self,
        models: Models,
        family: Family,
        device: torch.device,
        dtype: torch.dtype,
        max_rows: int,
        stepping: Stepping | None = None,
        kernel: FusedKernel | None = None,
        *,
        compiles: bool = False,
    ) -> None:
        """Take models that are in `dtype` already. With `stepping`, steps run in its buffers and graphs; with `kernel`,
        it adds linear layers' factors.
        """
        self._family, self._device, self._dtype, self.max_rows = family, device, dtype, max_rows
        for model in (models.unet, *models.texts.values(), models.vae):
            self._place(model)
        components = {"unet": models.unet, **models.texts, "vae": models.vae}
        self._configs = {name: model.config for name, model in components.items()}
        self.graphs = graphs = BaseGraphs.of(models, family, PRECISION_OF[dtype])
        self.vae = TorchVae(graphs.vae)
        self._texts = list(graphs.texts.values())
        self.step_layout = graphs.denoiser.layout
        self.kv_layout = graphs.projection.layout
        self.kv_slices = graphs.projection.slices
        self.text_layouts = tuple(text.layout for text in self._texts)
        self._kernel = kernel
        for source in (graphs.denoiser.source, graphs.projection.source, *(text.source for text in self._texts)):
            source.kernel = kernel
        self._stepping, self._compiles = stepping, compiles
        compute = _computing(graphs.denoiser)
        self._compute = compiled(compute) if compiles else compute
        self._captured = Captured(stepping, self._compute) if stepping is not None else None
        self._padding = Padding()
        self._parameters = {
            (component, plain(name)): tensor
            for component, state in graphs.states.items()
            for name, tensor in state.items()
        }

    @classmethod
    def load(
        cls,
        folder: Path,
        family: Family,
        device: str = "cpu",
        precision: Precision = "fp32",
        max_rows: int = 32,
        *,
        graphs: bool = True,
        compiles: bool = False,
        fused_lora: bool | None = None,
    ) -> Self:
        """Load a base from a folder in the diffusers layout. `graphs`: capture steps, where the device can. `compiles`:
        compile them, too.

        `fused_lora` is what `choose_kernel` is asked; compiled code has no place for it. Raises Unavailable if there is
        no such device or kernel, or nothing to compile with.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("the device is cuda, but torch sees no CUDA device; use --device cpu")
        dtype, torch_device = PRECISIONS[precision], torch.device(device)
        choose_kernels_by_time(torch_device)
        if compiles:
            check_compiler(torch_device)
        stepping = Stepping.on(torch_device, graphs=graphs) if torch_device.type != "cpu" else None
        kernel = choose_kernel(torch_device, asked=fused_lora) if not compiles else None
        with faults(f"the weights of {folder.name}"):
            models = Models.load(folder, family, dtype)
            return cls(models, family, torch_device, dtype, max_rows, stepping, kernel, compiles=compiles)

    def variant(
        self,
        changed: Changed,
        configs: Path | None = None,
        of: Version | None = None,  # noqa: ARG002 - TensorRT chooses engines by it
    ) -> Self:
        states = {component: dict(state) for component, state in self.graphs.states.items()}
        if configs is not None and "vae" in changed:  # it may be another than the base's, and bear less
            of_vae = vae_dtype(self._config("vae", configs), self._dtype)
            states["vae"] = {name: tensor.to(of_vae) for name, tensor in states["vae"].items()}
        for component, tensors in changed.items():
            if component not in states:
                continue  # such as a safety checker or an image encoder, which drawing does not use
            names = {plain(name): name for name in states[component]}
            for name, values in tensors.items():
                if plain(name) not in names:
                    raise Refused(
                        f"the base has no tensor for the checkpoint's {component}.{name}; "
                        "save it again with a current diffusers",
                        tensor=name,
                    )
                old = states[component][names[plain(name)]]
                states[component][names[plain(name)]] = values.to(old.device, old.dtype)
        texts = {
            part.encoder: _build_text(text_class(part), self._configs[part.encoder], states[part.encoder])
            for part in self._family.texts
        }
        models = Models(
            _build(UNet2DConditionModel, self._config("unet", configs), states["unet"]),
            texts,
            _build(AutoencoderKL, self._config("vae", configs), states["vae"]),
        )
        with faults("a variant's weights"):
            return type(self)(
                models,
                self._family,
                self._device,
                self._dtype,
                self.max_rows,
                self._stepping,
                self._kernel,
                compiles=self._compiles,
            )

    def _config(self, component: str, configs: Path | None) -> Any:
        """Return a component's config: the checkpoint's, whose scaling may differ, or the base's."""
        if configs is None:
            return self._configs[component]
        return json.loads((configs / component / "config.json").read_text())

    def _place(self, model: Model) -> Model:
        model.to(self._device, memory_format=memory_format(self._device))  # type: ignore[call-overload]
        return model.eval().requires_grad_(False)

    @property
    def device(self) -> str:
        return str(self._device)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @torch.inference_mode()
    def encode(self, encoder: int, inputs: TextInputs) -> EncodedText:
        with faults("a text"):
            encoded: EncodedText = self._texts[encoder](inputs.to(self._device, self._dtype))
        return encoded

    @torch.inference_mode()
    def project(self, states: Tensor, factors: Factors | None, of_values: Tensor | None = None) -> Tensor:
        with faults("a text's keys and values"):
            kv: Tensor = self.graphs.projection(states, self._cast(factors), of_values)
        return kv

    @torch.inference_mode()
    def denoise(self, sample: Tensor, timestep: Tensor, inputs: StepInputs) -> Tensor:
        with faults(f"a step of {len(sample)} rows"):
            step = Step(sample.to(self._dtype), timestep, inputs.to(self._device, self._dtype))
            if self._compiles or (self._captured is not None and self._captured.captures):
                step = self._padding(step)
            compute = self._captured or self._compute
            prediction: Tensor = compute(step)
            return prediction[: len(sample)].float()

    def _cast(self, factors: Factors | None) -> Factors | None:
        return factors.to(self._device, self._dtype) if factors is not None else None

    def prepare(self, includes: frozenset[Include], sizes: Mapping[str, int]) -> None:
        """Do nothing: eager graphs accept any inputs and sizes."""

    def load_net(self, version: Version, load: Callable[[], NetModel]) -> Nets:  # noqa: ARG002 - TensorRT chooses engines by it
        with faults("a ControlNet's weights"):
            return torch_nets(load(), torch.empty(0, dtype=self._dtype, device=self._device), self._stepping)

    def load_vae(self, folder: Path) -> TorchVae:
        return TorchVae(self._place(load_autoencoder(folder, self._dtype)))

    def close(self) -> None:
        """Do nothing: there is nothing to save."""

    def weight(self, target: str) -> Tensor:
        return self.parameter(f"{target}.weight")

    def parameter(self, name: str) -> Tensor:
        component, _, rest = name.partition(".")
        parameter: Tensor | None = self._parameters.get((component, plain(rest)))
        if parameter is None:
            raise Refused(f"the base has no {name}, which an adapter changes; use the base that it was trained on")
        return parameter

    def weights_digest(self) -> str:
        digest = hashlib.sha256()
        for state in self.graphs.states.values():
            for _, tensor in sorted(state.items()):
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, str]:
        precision = PRECISION_OF[self._dtype]
        return {"executor": "torch", "device": self.device, "precision": precision}


def _computing(denoiser: Denoiser) -> Callable[[Step], Tensor]:
    def compute(step: Step) -> Tensor:
        prediction: Tensor = denoiser(step.sample, step.timestep, step.inputs)
        return prediction

    return compute


def _build(kind: Any, config: Any, state: dict[str, Tensor]) -> Any:
    """Build a diffusers model with these tensors as its weights, without random initialisation or copies."""
    with torch.device("meta"):
        model = kind.from_config(config)
    model.load_state_dict(state, assign=True)
    return model


def _build_text(kind: type[TextModel], config: Any, state: dict[str, Tensor]) -> TextModel:
    """Build a text encoder; not on the meta device, because its position ids are not in `state`."""
    model = kind(config)
    model.load_state_dict(state, assign=True)
    return model


def weights_bytes(folder: Path, family: Family, precision: Precision) -> int:
    """Return the bytes in memory of a base in the diffusers layout once loaded, from the files' headers."""
    own = PRECISIONS[precision]
    of_vae = vae_dtype(AutoencoderKL.load_config(folder / "vae", local_files_only=True), own)
    components = {"unet": own, **{part.encoder: own for part in family.texts}, "vae": of_vae}
    return sum(_values(folder / name) * dtype.itemsize for name, dtype in components.items())


def _values(folder: Path) -> int:
    """Count the numbers of a component. Copies in other precisions (`….fp16.…`) in its folder are not counted."""
    files = list(folder.glob("*.safetensors"))
    default = [file for file in files if not {"fp16", "fp32", "bf16", "non_ema"} & set(file.name.split("."))] or files
    return sum(prod(info.shape) for file in default for info in read_header(file).tensors.values())
