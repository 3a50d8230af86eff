"""A running service over the tiny base, with LoRAs published beside it, and diffusers as the oracle."""

from __future__ import annotations

import os
import queue
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from scumble.errors import Refused
from scumble.events import Done, Event, Failed
from scumble.request import Request
from scumble_registry import Registry
from scumble_server.config import ServerConfig, default_executor
from scumble_server.executors import Executor
from scumble_server.service import Service

SDE, KARRAS = {"algorithm_type": "sde-dpmsolver++"}, {"use_karras_sigmas": True}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, KARRAS),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, SDE),
    "dpmpp_2m_sde_karras": (DPMSolverMultistepScheduler, SDE | KARRAS),
    "dpmpp_sde": (DPMSolverSinglestepScheduler, SDE),
    "dpmpp_sde_karras": (DPMSolverSinglestepScheduler, SDE | KARRAS),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}
"""diffusers' class for each name, and what its documentation adds for the webui's names."""


@dataclass
class Result:
    done: Done
    latents: Tensor


@dataclass
class Running:
    """A service whose latents can be seen just before they are decoded."""

    service: Service
    home: Path
    files: dict[str, Path]
    last: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        decode = self.service._decode

        def watched(job: Any) -> Done:
            self.last[:] = [torch.stack([row.sample for row in job.progress.rows])]
            return decode(job)

        self.service._decode = watched  # type: ignore[method-assign]

    @property
    def executor(self) -> Executor:
        """That of the base."""
        return self.executor_of(self.service.bases[0].version.name)

    def executor_of(self, base: str) -> Executor:
        with self.service._weights.open() as lease:
            return next(each for each in self.service.bases if each.version.name == base).executor(lease)

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """All at once; results in the order of the requests. Raises the first failure."""
        results: queue.Queue[tuple[int, Event, list[Tensor]]] = queue.Queue()
        for index, request in enumerate(requests):

            def on_event(event: Event, index: int = index) -> None:
                if isinstance(event, Done | Failed):
                    results.put((index, event, list(self.last)))

            self.service.submit(request, on_event)
        found: dict[int, Result] = {}
        for _ in requests:
            index, event, last = results.get(timeout=120)
            if isinstance(event, Failed):
                raise event.error
            assert isinstance(event, Done)
            found[index] = Result(event, last[0])
        return [found[index] for index in range(len(requests))]


@pytest.fixture(scope="session")
def published(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, make_lora: object
) -> tuple[Path, dict[str, Path]]:
    """A registry home with `tiny/base` and the LoRAs `l/a` (rank 4), `l/b` (rank 12), `l/plain` (UNet only)."""
    home = tmp_path_factory.mktemp("home")
    files = {"base": tiny_base}
    kinds = {
        "l/a": {"seed": 1},
        "l/b": {"seed": 2, "rank": 12},
        "l/plain": {"seed": 3, "rank": 20, "text": False},
        "l/full": {"seed": 5, "rank": 4, "full": True},
        "l/mixed": {"seed": 4, "rank": 8, "alphas": {"to_q": 3.0, "to_v": 24.0, "fc1": 2.0}},
    }
    with Registry.open(home, create=True) as registry:
        registry.publish(tiny_base, name="tiny/base")
        for name, how in kinds.items():
            files[name] = make_lora(tiny_base, tmp_path_factory.mktemp("lora"), **how)  # type: ignore[operator]
            registry.publish(files[name], name=name, base="tiny/base")
    return home, files


@pytest.fixture(scope="session")
def graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported graphs of all tests, of all of pytest-xdist's workers: to trace one takes seconds."""
    mine = tmp_path_factory.getbasetemp()
    folder = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "graphs"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def running(published: tuple[Path, dict[str, Path]], start: Callable[..., Running]) -> Iterator[Running]:
    home, files = published
    started = start(home, "tiny/base", files)
    yield started
    started.service.close()


@dataclass
class Reference:
    latents: Tensor
    pixels: np.ndarray


def diffusers_scheduler(request: Request, config: dict[str, Any]) -> Any:
    kind, named = SCHEDULERS[request.scheduler or "ddim"]
    options = {
        "timestep_spacing": request.options.timestep_spacing,
        "rescale_betas_zero_snr": request.options.rescale_betas,
    }
    return kind.from_config(config, **named, **{name: value for name, value in options.items() if value is not None})


def diffusers_alone(
    files: dict[str, Path], request: Request, pipeline: StableDiffusionPipeline | None = None
) -> Reference:
    """The same request through diffusers' own pipeline, LoRA loader and scheduler."""
    loaded = pipeline is not None
    pipeline = pipeline or StableDiffusionPipeline.from_pretrained(files["base"], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers_scheduler(request, DDIMScheduler.load_config(files["base"] / "scheduler"))
    if request.adapters and not loaded:
        for index, adapter in enumerate(request.adapters):
            pipeline.load_lora_weights(files[adapter.ref], adapter_name=f"a{index}")
        names = [f"a{index}" for index in range(len(request.adapters))]
        pipeline.set_adapters(names, [_weights(adapter) for adapter in request.adapters])
    arguments = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "width": request.width,
        "height": request.height,
        "eta": request.options.eta or 0.0,
    }
    count = request.num_images
    arguments["callback_on_step_end"] = _schedule(request)
    arguments["callback_on_step_end"](pipeline, -1, None, {})
    with torch.inference_mode():
        generators = [torch.Generator("cpu").manual_seed((request.seed or 0) + i) for i in range(count)]
        latents = pipeline(**arguments, num_images_per_prompt=count, generator=generators, output_type="latent").images
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        pixels = pipeline.image_processor.postprocess(decoded, output_type="np")
    return Reference(latents, (pixels * 255).round())


def _schedule(request: Request) -> Callable[..., dict[str, object]]:
    """Sets the UNet's weights for the step that comes next. The text encoder keeps its own."""

    def before_next(
        pipeline: StableDiffusionPipeline, step: int, _timestep: object, state: dict[str, object]
    ) -> object:
        for index, adapter in enumerate(request.adapters):
            active = adapter.is_active(step + 1, request.steps or 0)
            for module in pipeline.unet.modules():
                if isinstance(module, BaseTunerLayer):
                    module.set_scale(f"a{index}", adapter.weight if active else 0.0)
        return state

    scheduled = any(adapter.start > 0 or adapter.end < 1 for adapter in request.adapters)
    return before_next if scheduled else lambda *_: {}


def _weights(adapter: object) -> object:
    weight, text_weight = adapter.weight, adapter.text_weight  # type: ignore[attr-defined]
    text = weight if text_weight is None else text_weight
    if adapter.blocks is None:  # type: ignore[attr-defined]
        return {"unet": weight, "text_encoder": text}
    # diffusers multiplies nothing: a block's weight replaces the adapter's.
    scales = {name: value * weight for name, value in adapter.blocks.items()}  # type: ignore[attr-defined]
    unet = {
        "down": {"block_0": scales.get("down_blocks.0", weight)},
        "mid": scales.get("mid_block", weight),
        "up": {"block_1": scales.get("up_blocks.1", weight)},
    }
    return {"unet": unet, "text_encoder": text}


@pytest.fixture(scope="session", name="diffusers_alone")
def _diffusers_alone() -> object:
    return diffusers_alone


EXECUTORS = ("torch", *(("onnxruntime",) if find_spec("onnxruntime") is not None else ()))
"""Those that this machine has; engines need a GPU."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is marked so runs over every executor, fixtures and all."""
    marked = metafunc.definition.get_closest_marker("every_executor") is not None
    if marked and "executor" in metafunc.fixturenames:
        metafunc.parametrize("executor", EXECUTORS, indirect=True, scope="session")


_TORCH_ONLY = r"is a (hypernetwork on self-attention|ControlNet-LLLite), which changes the graph.*--executor torch"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """What only torch's graphs can do, others refuse by name, and say so: that is right too."""
    try:
        return (yield)
    except Refused as error:
        given = pyfuncitem.callspec.params.get("executor") if hasattr(pyfuncitem, "callspec") else None
        if given in {None, "torch"} or not re.search(_TORCH_ONLY, error.message):
            raise
        return True


@pytest.fixture(scope="session")
def executor(request: pytest.FixtureRequest) -> str:
    """What services run with that say nothing else: `SCUMBLE_EXECUTOR`, or each in turn (`every_executor`)."""
    return str(getattr(request, "param", default_executor()))


@pytest.fixture(scope="session")
def start(executor: str, graph_cache: Path) -> Callable[..., Running]:
    """Opens a service; graphs that ONNX Runtime needs are exported once for all tests."""

    def begin(home: Path, base: str, files: dict[str, Path], **config: Any) -> Running:
        chosen = ServerConfig(home=home, base=base, **{"executor": executor, **config})
        kept = home / "cache" / "onnx"
        if chosen.executor == "onnxruntime" and not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            kept.symlink_to(graph_cache)
        return Running(Service.open(chosen), home, files)

    return begin
