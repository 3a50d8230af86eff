"""A tiny random Stable Diffusion of the real classes, made locally, and folders of pictures to train it on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scumble_trainers.base import TrainingBase, find_base
from scumble_trainers.run import train
from scumble_trainers.steps.loop import Run
from support.every_method import TOKEN
from support.tiny_families import make_tiny_sd2, make_tiny_sdxl
from support.tiny_ip import make_image_encoder

RESOLUTION = 16
COLOURS = ("red", "green", "blue", "orange", "purple", "black", "brown", "pink")

MakeData = Callable[..., Path]


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps its precision for the life of the process; a test is a process of its own to it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Prepared(BaseException):
    """Stops a run before its first step."""


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """As `train`, up to where the first step would be."""

    def make(*arguments: Any) -> Run:
        found: list[Run] = []

        def stop(run: Run, *_: object) -> None:
            found.append(run)
            raise Prepared

        with monkeypatch.context() as patch:
            patch.setattr(Run, "train", stop)
            with pytest.raises(Prepared):
                train(*arguments)
        return found[0]

    return make


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16×16 pictures, 8×8×4 latents, weights from seed 0."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=600,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=RESOLUTION,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_tokenizer(folder.parent / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-level with no merges: every letter is a token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=24)


@pytest.fixture(scope="session", params=["sd2", "sdxl"])
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64x64 pictures, 8x8x4 latents: SD 2.x with v-prediction, and SDXL."""
    make = {"sd2": make_tiny_sd2, "sdxl": make_tiny_sdxl}[request.param]
    return make(tmp_path_factory.mktemp(request.param) / "base")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """Writes a folder with `count` pictures of coloured discs, of each of `sizes` in turn, and their captions."""

    def make(count: int, *sizes: tuple[int, int]) -> Path:
        folder = tmp_path / "data"
        folder.mkdir()
        lines = []
        for index in range(count):
            colour = COLOURS[index % len(COLOURS)]
            size = sizes[index % len(sizes)] if sizes else (RESOLUTION, RESOLUTION)
            picture = Image.new("RGB", size, "white")
            ImageDraw.Draw(picture).ellipse((2, 2, 8 + index % 6, 12), fill=colour)
            picture.save(folder / f"{index:02}.png")
            lines.append(json.dumps({"file_name": f"{index:02}.png", "text": f"{colour} disc {index}, flat style"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def seeing_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD 1 with an image encoder."""
    folder = tmp_path_factory.mktemp("seeing") / "base"
    shutil.copytree(base_folder, folder)
    make_image_encoder(folder / "image_encoder", preparation=True)
    return folder


@pytest.fixture
def base(seeing_folder: Path, tmp_path: Path) -> TrainingBase:
    return find_base(str(seeing_folder), tmp_path / "home")


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """Six pictures of three things by two hands, 64x64, each captioned with the token."""
    folder = tmp_path / "things"
    folder.mkdir()
    lines = []
    for index in range(6):
        colour, style = COLOURS[index // 2], ("flat", "round")[index % 2]
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((4, 4, 40 + 3 * index, 50), fill=colour)
        picture.save(folder / f"{index}.png")
        line = {"file_name": f"{index}.png", "text": f"{colour} disc {TOKEN}, {style} style"}
        lines.append(json.dumps(line | {"concept": colour, "style": style}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    return folder
