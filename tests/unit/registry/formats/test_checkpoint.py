"""Single files of checkpoints: what is told from them, and what is refused. Oracles are diffusers' classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scumble.errors import InvalidRequest, Refused
from scumble_registry import Registry
from scumble_registry.compatibility import BaseCompatibility, DreamboothCompatibility
from scumble_registry.formats.source import Hints

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.tiny_families import make_tiny_sd2

    return make_tiny_sd2(tmp_path_factory.mktemp("sd2") / "base")


def write(folder: Path, file: Path, **how: Any) -> Path:
    from support.single_files import write_single_file

    return write_single_file(folder, file, **how)


def add(file: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    from safetensors.torch import load_file, save_file

    save_file(load_file(file) | tensors, file, metadata)
    return file


def found(registry: Registry, path: Path, **how: Any) -> BaseCompatibility:
    compatibility = registry.publish(path, "n/base", **how).manifest.compatibility
    assert isinstance(compatibility, BaseCompatibility)
    return compatibility


def test_a_single_file_is_the_base_that_its_folder_is(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    file = write(tiny_base, tmp_path / "one.safetensors")
    assert (
        found(registry, file, hints=Hints(lambda: tiny_base))
        == registry.publish(tiny_base, "n/other").manifest.compatibility
    )
    registry.pull("n/base", tmp_path / "pulled")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pulled", local_files_only=True)
    assert again.unet.config.attention_head_dim == 4


def test_what_a_file_lacks_is_taken_from_the_folder_it_is_like(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    file = write(tiny_base, tmp_path / "one.safetensors", parts="u")
    with pytest.raises(Refused, match=r"no text_encoder and no vae.*--like"):
        registry.publish(add(write(tiny_base, tmp_path / "other.safetensors", parts="u"), real_width()), "n/alone")
    registry.publish(tiny_base, "n/whole")
    found(registry, file, hints=Hints(registry.folder_of("n/whole")))
    files = registry.find("n/base").manifest.files
    whole = registry.find("n/whole").manifest.files
    assert files["vae/diffusion_pytorch_model.safetensors"] == whole["vae/diffusion_pytorch_model.safetensors"]


def real_width() -> dict[str, Any]:
    """So that the family can be told without a text encoder."""
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    return {name: torch.zeros(16, 768)}


def test_the_folder_it_is_like_may_hold_one_precision_and_no_links(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    file = write(tiny_base, tmp_path / "one.safetensors", parts="u")
    found(registry, file, hints=Hints(registry.folder_of(tmp_path / "half")))
    assert "vae/diffusion_pytorch_model.safetensors" in registry.find("n/base").manifest.files
    (tmp_path / "half/vae/secret.json").symlink_to("/etc/hostname")
    with pytest.raises(Refused, match="is a link"):
        registry.publish(file, "n/base", hints=Hints(registry.folder_of(tmp_path / "half")))


def test_for_its_base_a_single_file_is_a_checkpoint_whose_unchanged_parts_are_the_bases(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    from support.tiny_variant import make_checkpoint

    registry.publish(tiny_base, "n/base")
    file = write(make_checkpoint(tiny_base, tmp_path / "tuned"), tmp_path / "one.safetensors")
    version = registry.publish(file, "n/dream", base="n/base")
    assert isinstance(version.manifest.compatibility, DreamboothCompatibility)
    assert list(version.manifest.compatibility.changed) == ["unet"]
    assert [name for name in version.manifest.files if name.endswith(".delta")] == [
        "unet/diffusion_pytorch_model.safetensors.delta"
    ]


def test_averaged_weights_are_taken_only_when_asked_for(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    file = write(tiny_base, tmp_path / "one.safetensors", ema=True)
    for name, how in {"plain": {}, "ema": {"ema": True}}.items():
        registry.publish(file, f"n/{name}", hints=Hints(lambda: tiny_base, **how))
        registry.pull(f"n/{name}", tmp_path / name)
    unet = "unet/diffusion_pytorch_model.safetensors"
    plain, averaged = load_file(tmp_path / "plain" / unet), load_file(tmp_path / "ema" / unet)
    assert torch.equal(plain["conv_in.weight"], load_file(tiny_base / unet)["conv_in.weight"])
    stored = load_file(file)
    assert torch.equal(averaged["conv_in.weight"], stored["model_ema.diffusion_modelinput_blocks00weight"])
    with pytest.raises(Refused, match="no averaged weights"):
        registry.publish(
            write(tiny_base, tmp_path / "two.safetensors"), "n/two", hints=Hints(lambda: tiny_base, ema=True)
        )


def test_what_sd2_predicts_must_be_said(registry: Registry, tiny_sd2: Path, tmp_path: Path) -> None:
    schedule = tiny_sd2 / "scheduler/scheduler_config.json"
    assert json.loads(schedule.read_text())["prediction_type"] == "v_prediction"
    file = write(tiny_sd2, tmp_path / "one.safetensors")
    with pytest.raises(Refused, match="--prediction-type"):
        registry.publish(file, "n/base")
    assert found(registry, file, hints=Hints(lambda: tiny_sd2)).prediction_type == "v_prediction"
    assert found(registry, file, hints=Hints(lambda: tiny_sd2, "epsilon")).prediction_type == "epsilon"
    said = add(file, {}, {"modelspec.prediction_type": "v"})
    assert found(registry, said, hints=Hints(lambda: tiny_sd2)).prediction_type == "v_prediction"
    with pytest.raises(InvalidRequest, match="leave --prediction-type out"):
        registry.publish(said, "n/base", hints=Hints(lambda: tiny_sd2, "epsilon"))


def test_the_mark_of_velocity_is_read(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    file = add(write(tiny_base, tmp_path / "one.safetensors"), {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    assert found(registry, file, hints=Hints(lambda: tiny_base)).prediction_type == "v_prediction"
    registry.pull("n/base", tmp_path / "pulled")
    schedule = json.loads((tmp_path / "pulled/scheduler/scheduler_config.json").read_text())
    assert schedule["rescale_betas_zero_snr"] is True


def test_keys_that_nobody_understands_are_refused_by_name(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    file = add(write(tiny_base, tmp_path / "one.safetensors"), {"model.diffusion_model.new.weight": torch.zeros(2)})
    with pytest.raises(Refused, match=r"model\.diffusion_model\.new\.weight"):
        registry.publish(file, "n/base", hints=Hints(lambda: tiny_base))


def test_nan_is_refused(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    bad = torch.full((4, 3), float("nan"))
    name = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    with pytest.raises(Refused, match="NaN"):
        registry.publish(
            add(write(tiny_base, tmp_path / "a.safetensors"), {name: bad}), "n/base", hints=Hints(lambda: tiny_base)
        )


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_weights_named_by_their_precision_get_the_plain_name(
    registry: Registry, tiny_base: Path, tmp_path: Path, *, shards: bool
) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    how = {"max_shard_size": "100KB"} if shards else {}
    pipeline.save_pretrained(tmp_path / "half", variant="fp16", **how)
    registry.publish(tmp_path / "half", "n/half")
    registry.pull("n/half", tmp_path / "pulled")
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "pulled/unet", local_files_only=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), pipeline.unet.parameters(), strict=True))
    if shards:
        assert len(list((tmp_path / "pulled/unet").glob("*-of-*.safetensors"))) > 1


def test_a_ckpt_of_lightning_is_what_its_safetensors_file_is(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    like = Hints(lambda: tiny_base)
    plain = registry.publish(write(tiny_base, tmp_path / "one.safetensors"), "n/plain", hints=like)
    pickled = registry.publish(write(tiny_base, tmp_path / "two.ckpt", lightning=True), "n/pickled", hints=like)
    assert pickled.manifest.files == plain.manifest.files
    assert pickled.manifest.compatibility == plain.manifest.compatibility


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("conditioner.embedders.0.model.text_projection", "SDXL's refiner"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("model.diffusion_model.input_blocks.1.1.time_stack.0.attn1.to_q.weight", "Stable Video Diffusion"),
        ("edm_mean", "Playground"),
    ],
)
def test_other_models_are_refused_by_name(registry: Registry, tmp_path: Path, key: str, says: str) -> None:
    from safetensors.torch import save_file

    save_file({key: torch.zeros(2, 2), "model.diffusion_model.a.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(Refused, match=says):
        registry.publish(tmp_path / "a.safetensors", "n/a")


def test_a_folder_of_a_transformer_is_refused_by_name(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "flux").mkdir()
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "flux/model_index.json").write_text(json.dumps(index))
    with pytest.raises(Refused, match="FluxPipeline"):
        registry.publish(tmp_path / "flux", "n/a")


def test_instruct_pix2pix_is_refused_by_name(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    file = add(write(tiny_base, tmp_path / "a.safetensors"), {name: torch.randn(16, 8, 3, 3)})
    with pytest.raises(Refused, match="in_channels 8"):
        registry.publish(file, "n/a", hints=Hints(lambda: tiny_base))
    import shutil

    shutil.copytree(tiny_base, tmp_path / "pix2pix")
    unet = diffusers.UNet2DConditionModel.from_config(
        {**diffusers.UNet2DConditionModel.load_config(tiny_base / "unet"), "in_channels": 8}
    )
    unet.save_pretrained(tmp_path / "pix2pix/unet")
    with pytest.raises(Refused, match="InstructPix2Pix"):
        registry.publish(tmp_path / "pix2pix", "n/a")


def test_a_single_file_for_inpainting_is_a_base_for_inpainting(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    from support.tiny_families import make_tiny_inpainting

    folder = make_tiny_inpainting(tiny_base, tmp_path / "inpainting")
    assert found(registry, write(folder, tmp_path / "a.safetensors"), hints=Hints(lambda: folder)).in_channels == 9
