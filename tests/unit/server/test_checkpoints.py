"""Single files, published and served, draw what diffusers draws with its own loader of single files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from scumble.request import Adapter, Request
from scumble_registry import Registry
from scumble_registry.formats.source import Hints
from support.formats_table import note
from support.single_files import write_single_file
from support.tiny_families import make_tiny_sd2, make_tiny_sdxl
from support.tiny_variant import make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from support.running import Running

PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 6, "guidance_scale": 5.0, "width": 64, "height": 64}
FAMILIES = ("sd1", "sd2", "sdxl")
TEXTS = {"sd1": ("text_encoder",), "sd2": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("bases")
    return {"sd1": tiny_base, "sd2": make_tiny_sd2(made / "sd2"), "sdxl": make_tiny_sdxl(made / "sdxl")}


@pytest.fixture(scope="module")
def tuned(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each family a fine-tuning, as a folder: what the single files are written from."""
    made = tmp_path_factory.mktemp("tuned")
    return {
        family: make_checkpoint(folder, made / family, seed=1, components=("unet", *TEXTS[family]))
        for family, folder in folders.items()
    }


@pytest.fixture(scope="module")
def files(tuned: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("files")
    return {family: write_single_file(folder, made / f"{family}.safetensors") for family, folder in tuned.items()}


@pytest.fixture(scope="module")
def running(
    folders: dict[str, Path],
    files: dict[str, Path],
    start: Callable[..., Running],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    with Registry.open(home, create=True) as registry:
        for family in FAMILIES:
            registry.publish(folders[family], name=f"base/{family}")
            registry.publish(files[family], name=f"single/{family}", hints=Hints(registry.folder_of(folders[family])))
            registry.publish(files[family], name=f"dream/{family}", base=f"base/{family}")
    bases = [f"{kind}/{family}" for kind in ("base", "single") for family in FAMILIES]
    started = start(home, bases[0], files, more_bases=bases[1:])
    yield started
    started.service.close()


def oracle(file: Path, folder: Path, family: str) -> Tensor:
    """diffusers' loader. Of SDXL's second text encoder and SD 2.x's it reads real sizes only, so the test's folder,
    from which the file was written, gives these.
    """
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    given = kind.from_pretrained(folder, local_files_only=True)
    own = {} if family == "sd1" else {name: getattr(given, name) for name in TEXTS[family]}
    pipeline = kind.from_single_file(file, config=str(folder), local_files_only=True, **own)
    return drawn(pipeline)


def drawn(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        latents: Tensor = pipeline(
            prompt=PLAIN["prompt"],
            num_inference_steps=PLAIN["steps"],
            guidance_scale=PLAIN["guidance_scale"],
            width=64,
            height=64,
            generator=torch.Generator("cpu").manual_seed(7),
            output_type="latent",
        ).images
    return latents


def scheduler_of(family: str) -> str:
    return "euler" if family == "sdxl" else "ddim"


def ours(running: Running, family: str, base: str, *adapters: str) -> Tensor:
    asked = Request.parse(
        {
            **PLAIN,
            "base": base,
            "scheduler": scheduler_of(family),
            "adapters": [Adapter(ref=each) for each in adapters],
        }
    )
    return running.run([asked])[0].latents


@pytest.mark.oracle
@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_draws_what_diffusers_draws(
    running: Running, files: dict[str, Path], tuned: dict[str, Path], family: str
) -> None:
    expected = oracle(files[family], tuned[family], family)
    plain = ours(running, family, f"base/{family}")
    for name, latents in {
        "checkpoint, single file": ours(running, family, f"single/{family}"),
        "checkpoint, single file, for a base": ours(running, family, f"base/{family}", f"dream/{family}"),
    }.items():
        note(name, family, "diffusers", (latents - expected).abs().max().item(), (plain - expected).abs().max().item())
