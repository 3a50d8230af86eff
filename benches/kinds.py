"""Measures the cost of each kind of adapter: of a step, against a bare step and its arithmetic, and to a first step.

Prints JSON. A step is one pass of the denoiser (and of nets) over a batch of eight images, of which one or all have the
adapter. `extra` is added time over added arithmetic: at 1 its operations run as fast as the base's. Attention is not
counted, because torch's counter does not support the CPU's kernel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from measure import against, count_flops, machine
from memory import FAMILIES
from torch import Tensor

from scumble_build.graphs.adapted import Factors
from scumble_build.graphs.controlnet import ControlNet
from scumble_build.graphs.denoiser import Denoiser, KVProjection
from scumble_build.graphs.inputs import ImageInputs, NetInputs, StepInputs, level_sizes
from scumble_server.executors.torch.net import TorchNet
from scumble_server.methods.controlnet.residuals import NetCall, with_residuals
from support.paging import some_factors

IMAGES = 8
RANKS = (16, 64, 128)
BASE = Path(__file__).parents[1] / "demo" / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wide", action="store_true", help="also at SD 1.5's real width (8 GB, some 20 minutes)")
    parser.add_argument("--xl", action="store_true", help="also at SDXL's real width (20 GB, an hour)")
    parser.add_argument("--steps-only", action="store_true", help="do not measure the time to a first step")
    arguments = parser.parse_args()
    unet = UNet2DConditionModel.from_pretrained(BASE / "unet", local_files_only=True, torch_dtype=torch.float32)
    result: dict[str, Any] = {
        "machine": machine(),
        "rounds": arguments.rounds,
        "step_demo_base": Steps(unet, 16, guided=True).measure(arguments.rounds),
    }
    if not arguments.steps_only:
        from first_step import first_steps

        result["first_step_demo_base"] = first_steps(BASE, arguments.rounds)
    # Random weights: speed does not depend on them.
    for asked, name, family in (
        (arguments.wide, "step_sd15_width", "sd1.5"),
        (arguments.xl, "step_sdxl_width", "sdxl"),
    ):
        if asked:
            wide = UNet2DConditionModel(**FAMILIES[family].unet)
            result[name] = Steps(wide, 16, guided=False).measure(arguments.rounds)
    print(json.dumps(result, indent=2))


class Steps:
    """A batch of eight images of `size` x `size` latents; a guided image is two rows."""

    def __init__(self, unet: UNet2DConditionModel, size: int, *, guided: bool) -> None:
        self.size, self.per_image = size, 2 if guided else 1
        self.rows = IMAGES * self.per_image
        net = ControlNetModel.from_unet(unet)
        self.residuals = len(net.controlnet_down_blocks) + 1
        context = int(unet.config.cross_attention_dim)
        self.channels = unet.config.block_out_channels
        unet = unet.eval().requires_grad_(False)
        self.projection = KVProjection(unet)
        self.denoiser = Denoiser(unet, self.projection.slices)
        self.sample = torch.randn(self.rows, 4, size, size)
        self.timestep = torch.linspace(900, 100, self.rows)
        with torch.inference_mode():
            self.kv = self.projection(torch.randn(self.rows, 77, context))
            self.net = TorchNet(ControlNet(net), self.kv)
            self.net_kv = self.net.project(torch.randn(self.rows, 77, context))
            self.of_xl: dict[str, Tensor] = {}
            self.added: Tensor | None = None
            if unet.config.addition_embed_type == "text_time":
                pooled = torch.randn(self.rows, unet.config.projection_class_embeddings_input_dim - 6 * 256)
                self.of_xl = {"pooled": pooled, "sizes": torch.full((self.rows, 6), 1024.0)}
                self.added = self.net.condition(**self.of_xl)
        self.hint = torch.randn(self.rows, self.channels[0], size, size)

    def measure(self, rounds: int) -> dict[str, dict[str, float]]:
        cases = self.cases()
        flops = {}
        for name, run in cases.items():
            with count_flops() as counted:
                run()
            flops[name] = counted[0]
        with torch.inference_mode():
            measured = against(cases["bare"], cases, rounds)
        return {
            name: {
                "seconds": round(seconds, 5),
                "ratio": round(ratio, 4),
                "arithmetic": round(flops[name] / flops["bare"], 4),
                **_extra(ratio - 1, flops[name] / flops["bare"] - 1),
            }
            for name, (seconds, ratio) in measured.items()
        } | {
            "step with nets over bare and nets alone": self._sum_of_parts(
                {k: ratio for k, (_, ratio) in measured.items()}
            )
        }

    def cases(self) -> dict[str, Callable[[], object]]:
        by_name: dict[str, StepInputs] = {"bare": self._with()}
        for how, images in (("one image", 1), ("all images", IMAGES)):
            for layout in ("small", "full"):
                for rank in RANKS:
                    by_name[f"LoRA {layout} R {rank}, {how}"] = self._with(factors=self._factors(layout, rank, images))
            by_name[f"DoRA small R 16, {how}"] = self._with(factors=self._factors("small", 16, images, stretch=True))
            for tokens in (4, 16):
                by_name[f"IP-Adapter {tokens} tokens, {how}"] = self._with(images=self._pictures(tokens, images))
        by_name["T2I-Adapter, all images"] = self._with(features=self._features())
        cases: dict[str, Callable[[], object]] = {
            name: (lambda inputs=inputs: self.denoiser(self.sample, self.timestep, inputs))
            for name, inputs in by_name.items()
        }
        for how, images in (("one image", 1), ("all images", IMAGES)):
            call = self._call(images)
            cases[f"ControlNet, {how}"] = lambda call=call: self._step_with_net(call)
            cases[f"ControlNet alone, {how}"] = lambda call=call: self._net_alone(call)
        residuals = self._with(
            residuals=with_residuals(by_name["bare"], [self._call(1)], self.sample, self.timestep).residuals
        )
        cases["rows beside a net, the net itself not counted"] = lambda: self.denoiser(
            self.sample, self.timestep, residuals
        )
        return cases

    def _with(self, **parts: Any) -> StepInputs:
        return StepInputs(self.kv, **self.of_xl, **parts)

    def _factors(self, layout: str, rank: int, images: int, *, stretch: bool = False) -> Factors:
        """Make factors for every target of the layout, a set for each image."""
        factors = some_factors(
            self.denoiser.layout,
            [image for image in range(images) for _ in range(self.per_image)],
            rank,
            full=layout == "full",
            scale=1e-3,
            rows_per_set=self.per_image,
            stretch=0.01 if stretch else 0.0,
        )
        return replace(factors, stretch_in=None)

    def _pictures(self, tokens: int, images: int) -> ImageInputs:
        m = images * self.per_image
        return ImageInputs(
            torch.arange(m),
            torch.randn(m, 1, tokens, self.kv.shape[-1]),
            None,
            torch.ones(m, 1),
        )

    def _features(self) -> tuple[Tensor, ...]:
        sizes, widths = level_sizes(self.size, self.size, len(self.channels)), self.channels
        if self.of_xl:  # after the first downsampler, at each further level, in the middle
            sizes, widths = [sizes[1], *sizes[1:], sizes[-1]], (*widths, widths[-1])
        return tuple(torch.randn(self.rows, width, *size) for width, size in zip(widths, sizes, strict=True))

    def _call(self, images: int) -> NetCall:
        m = images * self.per_image
        rows = torch.arange(m)
        added = self.added[:m] if self.added is not None else None
        inputs = NetInputs(self.net_kv[:m], self.hint[:m], added)
        return NetCall(self.net, rows, inputs, torch.ones(m, self.residuals))

    def _step_with_net(self, call: NetCall) -> Tensor:
        inputs = with_residuals(self._with(), [call], self.sample, self.timestep)
        output: Tensor = self.denoiser(self.sample, self.timestep, inputs)
        return output

    def _net_alone(self, call: NetCall) -> object:
        return call.net.residuals(self.sample[call.rows], self.timestep[call.rows], call.inputs)

    @staticmethod
    def _sum_of_parts(ratios: dict[str, float]) -> dict[str, float]:
        return {
            how: round(ratios[f"ControlNet, {how}"] / (1 + ratios[f"ControlNet alone, {how}"]), 4)
            for how in ("one image", "all images")
        }


def _extra(time_added: float, arithmetic_added: float) -> dict[str, float]:
    return {"extra": round(time_added / arithmetic_added, 2)} if arithmetic_added > 1e-4 else {}


if __name__ == "__main__":
    main()
