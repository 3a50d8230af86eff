"""An adapter of each kind comes back from every layout that its kind has, and other tools' own code reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, StableDiffusionPipeline, T2IAdapter
from safetensors.torch import load_file, save_file

from scumble.errors import Refused, ScumbleError
from scumble_registry import Registry
from scumble_registry.compatibility import kinds
from scumble_registry.exporting import export
from scumble_registry.formats import FORMATS, format_of
from support.control_nets import load_unet, make_net, write_cldm, write_control_lora
from support.every_kind import EveryKind, publish_every_kind
from support.tiny_ip import make_image_encoder, make_ip_adapter


@pytest.fixture(scope="module")
def world(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Registry, EveryKind]]:
    folder = tmp_path_factory.mktemp("every")
    with Registry.open(folder / "home", create=True) as registry:
        yield registry, publish_every_kind(registry, tiny_base, folder / "files")


def test_every_kind_has_a_format_and_layouts() -> None:
    ours = [kind for kind, model in kinds().items() if model.__module__.startswith("scumble_registry.")]
    assert sorted(ours) == sorted(form.kind for form in FORMATS)
    assert all(form.layouts for form in FORMATS)


def test_exported_and_published_again_everything_has_the_same_record(
    world: tuple[Registry, EveryKind], tmp_path: Path
) -> None:
    registry, every = world
    count = 0
    for name in every.files:
        version = registry.resolve(name)
        for layout in format_of(version.manifest.kind).layouts:
            out = tmp_path / f"{layout}-{name}"
            if name == "hyper/predictor":
                with pytest.raises(Refused, match="no other tool"):
                    export(registry, name, layout, out)
                continue
            export(registry, name, layout, out)
            again = registry.publish(
                out,
                f"{layout}/{name.replace('/', '-')}",
                base=None if name == every.base else every.base,
                image_encoder="every/encoder" if name.startswith("ip/") else None,
                trigger_words=version.manifest.trigger_words,
            )
            assert again.manifest.record == version.manifest.record, (name, layout)
            if version.manifest.record is None:
                weights = {
                    blob for file, blob in version.manifest.files.items() if file.endswith((".delta", "tensors"))
                }
                assert weights <= set(again.manifest.files.values()), (name, layout)
            assert again.manifest.compatibility == version.manifest.compatibility, (name, layout)
            count += 1
    assert count >= 20


@pytest.mark.parametrize("kind", ["base", "full", "plus", "faceid", "faceid_plus"])
def test_an_ip_adapter_comes_back_tensor_by_tensor(
    world: tuple[Registry, EveryKind], kind: str, tmp_path: Path
) -> None:
    registry, every = world
    file = make_ip_adapter(every.files[every.base], tmp_path / f"{kind}-plusv2.safetensors", kind, seed=3)
    version = registry.publish(file, f"ip/{kind.replace('_', '-')}", base=every.base)
    export(registry, version.ref, "diffusers", tmp_path / "out")
    (written,) = (tmp_path / "out").iterdir()
    before, after = load_file(file), load_file(written)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = registry.publish(tmp_path / "out", "ip/again", base=every.base)
    assert again.manifest.compatibility == version.manifest.compatibility


def test_an_ip_adapter_s_own_image_encoder_comes_along(world: tuple[Registry, EveryKind], tmp_path: Path) -> None:
    registry, every = world
    folder = tmp_path / "folder"
    make_image_encoder(folder / "image_encoder")
    make_ip_adapter(every.files[every.base], folder / "ip.safetensors", "plus", seed=4)
    version = registry.publish(folder, "ip/with-encoder", base=every.base)
    export(registry, version.ref, "diffusers", tmp_path / "out")
    again = registry.publish(tmp_path / "out", "ip/with-encoder-again", base=every.base)
    assert again.manifest.compatibility == version.manifest.compatibility
    assert again.manifest.record == version.manifest.record


def test_diffusers_loads_nets_from_what_was_in_the_original_layout(
    world: tuple[Registry, EveryKind], tmp_path: Path
) -> None:
    registry, every = world
    unet = load_unet(every.files[every.base])
    net = make_net(unet, 9)
    registry.publish(write_cldm(net, tmp_path / "cldm.safetensors"), "net/cldm", base=every.base)
    export(registry, "net/cldm", "diffusers", tmp_path / "out")
    loaded = ControlNetModel.from_pretrained(tmp_path / "out", local_files_only=True)
    picture, latents = torch.rand(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    text = torch.randn(1, 5, unet.config.cross_attention_dim)
    with torch.no_grad():
        wanted = net.eval()(latents, 3, text, picture, return_dict=False)
        got = loaded.eval()(latents, 3, text, picture, return_dict=False)
    assert torch.allclose(wanted[1], got[1], atol=1e-5)
    assert wanted[1].abs().max() > 1e-2


def test_a_control_lora_has_no_diffusers_layout(world: tuple[Registry, EveryKind], tmp_path: Path) -> None:
    registry, every = world
    net = make_net(load_unet(every.files[every.base]), 8)
    registry.publish(write_control_lora(net, tmp_path / "control.safetensors"), "net/control-lora", base=every.base)
    with pytest.raises(Refused, match="export it as webui"):
        export(registry, "net/control-lora", "diffusers", tmp_path / "out")
    export(registry, "net/control-lora", "webui", tmp_path / "out")
    again = registry.publish(tmp_path / "out", "net/control-lora-again", base=every.base)
    assert again.manifest.compatibility == registry.resolve("net/control-lora").manifest.compatibility


def test_diffusers_and_torch_read_what_is_exported(world: tuple[Registry, EveryKind], tmp_path: Path) -> None:
    registry, every = world
    for name, kind in (("one", ControlNetModel), ("union", ControlNetUnionModel), ("t2i", T2IAdapter)):
        export(registry, f"net/{name}", "diffusers", tmp_path / name)
        kind.from_pretrained(tmp_path / name, local_files_only=True)
    pipeline = StableDiffusionPipeline.from_pretrained(every.files[every.base], local_files_only=True)
    export(registry, "word/bad", "diffusers", tmp_path / "word")
    pipeline.load_textual_inversion(tmp_path / "word/learned_embeds.safetensors")
    assert "<bad>" in pipeline.tokenizer.get_vocab()
    export(registry, "hyper/context", "webui", tmp_path / "hyper")
    loaded = torch.load(tmp_path / "hyper/hypernetwork.pt", weights_only=True)
    assert {key for key in loaded if isinstance(key, int)}
    assert isinstance(loaded["layer_structure"], list)
    export(registry, "lora/small", "diffusers", tmp_path / "lora")
    pipeline.load_lora_weights(tmp_path / "lora/pytorch_lora_weights.safetensors")
    loaded = {name for name, _ in pipeline.unet.named_modules() if name.endswith(".lora_A")}
    targets = registry.resolve("lora/small").manifest.compatibility.requires  # type: ignore[union-attr]
    assert loaded == {f"{name.removeprefix('unet.')}.lora_A" for name in targets if name.startswith("unet.")}


def test_a_pair_for_two_text_encoders_comes_back(registry: Registry, tmp_path: Path) -> None:
    save_file({"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}, tmp_path / "neg.safetensors")
    version = registry.publish(tmp_path / "neg.safetensors", "word/neg")
    for layout in ("diffusers", "webui"):
        export(registry, "word/neg", layout, tmp_path / layout)
        again = registry.publish(tmp_path / layout, f"word/{layout}")
        assert again.manifest.record == version.manifest.record
        assert again.manifest.trigger_words == ("neg",)


def test_errors_of_exports_are_scumble_s_own(world: tuple[Registry, EveryKind], tmp_path: Path) -> None:
    registry, every = world
    for name in every.files:
        with pytest.raises(ScumbleError, match="it can be as"):
            export(registry, name, "onnx", tmp_path / "out")
