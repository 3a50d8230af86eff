"""Trains diffusers' ControlNetModel beside the frozen UNet; its zero convolutions change nothing at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from scumble.errors import Incompatible, InvalidRequest
from scumble_build.control_maps import parse
from scumble_build.graphs.loading import load_whole
from scumble_build.pictures import BLACK
from scumble_trainers.base import Pipeline, TrainingBase
from scumble_trainers.data.dataset import Example, load_picture
from scumble_trainers.method import DTYPES, Condition, Material, TrainingMethod
from scumble_trainers.methods.controlnet.settings import READY, ControlNetSettings
from scumble_trainers.progress import ProgressReport
from scumble_trainers.results.sampling import Samples, draw_samples
from scumble_trainers.settings import StoredType

FOLDER = "controlnet"
HINT = (16, 32, 96, 256)  # lllyasviel's widths; each but the first halves the picture
CHANNELS = 3  # of a control picture


class ControlNetTraining(TrainingMethod[ControlNetSettings]):
    """Trains the copy in fp32. Gradients pass only through the UNet's decoder, not its encoder."""

    name = "controlnet"
    adapter = FOLDER

    def __init__(self, pipeline: Pipeline, settings: ControlNetSettings, base: TrainingBase) -> None:
        super().__init__(pipeline, settings, base)
        self.net: Any = self._net().float().to(self.device).requires_grad_(requires_grad=True)
        self.maps: list[Tensor] = []

    def begin(self, material: Material, device: torch.device, report: ProgressReport) -> None:
        """Compute every picture's control map, kept as bytes `(3, H, W)`."""
        super().begin(material, device, report)
        for number, example in enumerate(material.examples, start=1):
            height, width = (int(side) for side in material.framing[number - 1, 4:].tolist())
            self.maps.append(torch.from_numpy(self._map(example, (width, height))).permute(2, 0, 1).contiguous())
            report("control maps", number, len(material.examples))

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.net.named_parameters())

    def predict(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        maps = torch.stack([self.maps[picture] for picture in condition.pictures.tolist()])
        down, middle = self.net(
            noisy,
            timesteps,
            condition.text.states,
            controlnet_cond=maps.to(self.device).float() / 255,
            added_cond_kwargs=self.added(condition),
            return_dict=False,
        )
        dtype = self.unet.dtype
        return self.denoise(
            condition,
            noisy,
            timesteps,
            down_block_additional_residuals=[residual.to(dtype) for residual in down],
            mid_block_additional_residual=middle.to(dtype),
        )

    def draw(self, samples: Samples) -> list[Image.Image]:
        """Draw each row with a held-out picture's map, in the order of their captions if those are the prompts."""
        among = self.material.held if len(self.material.held) else self.material.trained
        rows = among[torch.arange(len(samples.prompts)) % len(among)].tolist()
        size = (samples.resolution, samples.resolution)
        maps = [Image.fromarray(self._map(self.material.examples[row], size)) for row in rows]
        xl = "text_encoder_2" in self.pipeline.components
        kind: Any = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
        more = {} if xl else {"requires_safety_checker": False}
        pipeline = kind(**self.pipeline.components, controlnet=self.net, **more)
        return draw_samples(pipeline, samples, image=maps)

    def save(self, folder: Path, dtype: StoredType) -> None:
        """Save a copy in `dtype`; the trained weights stay fp32."""
        state = {name: value.detach().cpu().to(DTYPES[dtype]) for name, value in self.net.state_dict().items()}
        copy: Any = ControlNetModel.from_config(self.net.config).to(DTYPES[dtype])
        copy.load_state_dict(state)
        copy.save_pretrained(folder / FOLDER)

    def enable_gradient_checkpointing(self) -> None:
        super().enable_gradient_checkpointing()
        self.net.enable_gradient_checkpointing()

    def _net(self) -> Any:
        init = self.settings.init
        if init is None:
            return ControlNetModel.from_unet(
                self.unet, conditioning_channels=CHANNELS, conditioning_embedding_out_channels=self._hint()
            )
        if not (init / "config.json").is_file():
            raise Incompatible(f"{init} is no ControlNet folder: it has no config.json", field="init")
        return load_whole(ControlNetModel, init, torch.float32)

    def _hint(self) -> tuple[int, ...]:
        """Return the widths of the hint's layers, as many as bring a picture to the latents' size."""
        needed = len(self.pipeline.vae.config.block_out_channels)
        given = self.settings.hint_channels
        if given and len(given) != needed:
            raise InvalidRequest(
                f"{len(given)} hint channels: this base's latents need {needed} of them", field="hint_channels"
            )
        return given or (*HINT, *[HINT[-1]] * needed)[:needed]

    def _map(self, example: Example, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Load a control picture `(H, W, 3)` of `size` (width, height)."""
        if self.settings.preprocessor == READY:
            return np.array(load_picture(cast(Path, example.control), size, BLACK))
        return parse(self.settings.preprocessor).apply(np.ascontiguousarray(load_picture(example.path, size)))
