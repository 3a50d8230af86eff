"""Tokens, keys and values are those of diffusers' own loader; two requests at once do not meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from scumble_build.graphs.denoiser import KVProjection
from scumble_build.graphs.ip_adapter import IpAdapter, layer_scales
from scumble_build.graphs.vision import ImageEncoder
from scumble_registry import Registry
from scumble_registry.compatibility import IpAdapterCompatibility
from scumble_registry.formats.ip_adapter import read_record
from support.tiny_ip import EMBEDDING, FACE, KINDS, STATES, make_image_encoder, make_ip_adapter

CPU = "cpu"


@pytest.fixture(scope="module")
def registry(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    opened = Registry.open(tmp_path_factory.mktemp("home"), create=True)
    opened.publish(tiny_base, "tiny/base")
    return opened


@pytest.fixture
def pictures() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (50, 70, 3), dtype=np.uint8), draw.integers(0, 256, (33, 32, 3), dtype=np.uint8)]


@pytest.mark.parametrize(("kind", "v2"), [*((kind, False) for kind in KINDS), ("faceid_plus", True)])
def test_tokens_and_kv_equal_diffusers(
    registry: Registry, tiny_base: Path, tmp_path: Path, kind: str, v2: bool
) -> None:
    file = make_ip_adapter(tiny_base, tmp_path / ("plusv2.safetensors" if v2 else "ip.safetensors"), kind)
    version = registry.publish(file, f"ip/{kind.replace('_', '-')}{'2' if v2 else ''}", base="tiny/base")
    compatibility = version.manifest.compatibility
    assert isinstance(compatibility, IpAdapterCompatibility)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    pipeline.load_ip_adapter(tmp_path, subfolder="", weight_name=file.name, image_encoder_folder=None)
    unet = pipeline.unet
    slices = KVProjection(UNet2DConditionModel.from_pretrained(tiny_base / "unet")).slices
    ours = IpAdapter(read_record(registry.record_path(version)), compatibility, slices)
    embedding = torch.randn(2, EMBEDDING if kind == "base" else FACE)
    states = torch.randn(2, 17, STATES)
    oracle = unet.encoder_hid_proj.image_projection_layers[0]
    if kind == "faceid_plus":
        oracle.clip_embeds, oracle.shortcut = states[None], v2
    with torch.inference_mode():
        tokens = ours.tokens(embedding, states)
        expected = oracle(embedding if kind in {"base", "faceid", "faceid_plus"} else states)
        assert torch.allclose(tokens, expected, atol=2e-6)
        other = ours.tokens(torch.randn(1, FACE if kind != "base" else EMBEDDING), torch.randn(1, 17, STATES))
        assert torch.equal(ours.tokens(embedding, states), tokens), "a request in between leaves nothing behind"
        assert not torch.allclose(other, tokens[:1], atol=1e-2)
        kv = ours(tokens)
        for place in slices:
            processor = unet.attn_processors[f"{place.name}.processor"]
            key = kv[..., place.offset : place.offset + place.width]
            value = kv[..., place.offset + place.width : place.offset + 2 * place.width]
            assert torch.allclose(key, processor.to_k_ip[0](expected), atol=1e-5)
            assert torch.allclose(value, processor.to_v_ip[0](expected), atol=1e-5)


@pytest.mark.parametrize("preparation", [False, True])
def test_an_encoding_equals_transformers(tmp_path: Path, pictures: list[np.ndarray], preparation: bool) -> None:
    folder = make_image_encoder(tmp_path, preparation=preparation)
    model = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    prepare = (
        CLIPImageProcessorPil.from_pretrained(folder) if preparation else CLIPImageProcessorPil(size=32, crop_size=32)
    )
    ours = ImageEncoder(folder, folder if preparation else None, CPU, torch.float32)
    pixels = prepare([Image.fromarray(each) for each in pictures], return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected = model(pixels, output_hidden_states=True)
        nothing = model(torch.zeros_like(pixels[:1]), output_hidden_states=True)
    encoded = ours.encode(pictures)
    assert torch.allclose(encoded.embedding, expected.image_embeds, atol=1e-6)
    assert torch.allclose(encoded.states, expected.hidden_states[-2], atol=1e-6)
    assert torch.allclose(ours.encode_nothing().states, nothing.hidden_states[-2], atol=1e-6)


def test_alpha_is_left_out(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    encoder = ImageEncoder(make_image_encoder(tmp_path), None, CPU, torch.float32)
    see_through = np.concatenate([pictures[0], np.full((50, 70, 1), 7, np.uint8)], -1)
    assert torch.equal(encoder.prepare([see_through]), encoder.prepare(pictures[:1]))


def test_layer_scales_touch_values_only(tiny_base: Path) -> None:
    slices = KVProjection(UNet2DConditionModel.from_pretrained(tiny_base / "unet")).slices
    scales = layer_scales(slices, {f"unet.{slices[1].name}": 0.25})
    place = slices[1]
    changed = torch.zeros(len(scales), dtype=torch.bool)
    changed[place.offset + place.width : place.offset + 2 * place.width] = True
    assert (scales[changed] == 0.25).all()
    assert (scales[~changed] == 1).all()
