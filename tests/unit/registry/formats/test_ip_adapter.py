"""IP-Adapters from every layout: names, kinds, what they fit, which image encoder they read with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scumble.cli import run
from scumble.errors import Incompatible, IntegrityError, InvalidRequest, NotFound, Refused
from scumble_registry import Registry, Version
from scumble_registry.compatibility import ImageEncoderCompatibility, IpAdapterCompatibility
from scumble_registry.formats.ip_adapter import read_record, write_record
from scumble_registry.formats.safetensors_header import Array, read_header, read_tensors, write
from scumble_registry.formats.source import Hints

tiny_ip = pytest.importorskip("support.tiny_ip")
diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def based(registry: Registry, tiny_base: Path) -> Registry:
    registry.publish(tiny_base, "tiny/base")
    return registry


@pytest.fixture
def file(tiny_base: Path, tmp_path: Path) -> Path:
    return adapter(tiny_base, tmp_path, "base")


def adapter(base: Path, folder: Path, kind: str, name: str = "ip.safetensors", **how: Any) -> Path:
    path: Path = tiny_ip.make_ip_adapter(base, folder / name, kind, **how)
    return path


def publish(registry: Registry, path: Path, name: str = "ip/a", **how: Any) -> Version:
    return registry.publish(path, name, base="tiny/base", **how)


def compatibility(version: Version) -> IpAdapterCompatibility:
    found = version.manifest.compatibility
    assert isinstance(found, IpAdapterCompatibility)
    return found


def rewrite(file: Path, change: dict[str, Array | None], metadata: dict[str, str] | None = None) -> Path:
    """The same file with some tensors changed, or left out (None)."""
    tensors = {**read_tensors(file, read_header(file)), **change}
    file.write_bytes(write({name: np.array(v) for name, v in tensors.items() if v is not None}, metadata or {}))
    return file


@pytest.mark.parametrize(
    ("kind", "how", "expected"),
    [
        ("base", {}, (4, 40, None)),
        ("base", {"tokens": 8}, (8, 40, None)),
        ("full", {}, (None, 48, None)),
        ("plus", {"tokens": 16}, (16, 48, None)),
        ("faceid", {"lora": 4}, (4, None, 24)),
        ("faceid", {"tokens": 16}, (16, None, 24)),
        ("faceid_plus", {"lora": 4}, (4, 48, 24)),
    ],
)
def test_kinds(
    based: Registry, tiny_base: Path, tmp_path: Path, kind: str, how: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    found = compatibility(publish(based, adapter(tiny_base, tmp_path, kind, **how)))
    assert (found.projection, found.shortcut, found.context, found.family) == (kind, False, 32, "sd1")
    assert (found.tokens, found.picture_width, found.embedding_width) == expected
    assert (found.lora is not None) == ("lora" in how)


def test_indices_are_diffusers_order(based: Registry, tiny_base: Path, tmp_path: Path) -> None:
    """Every index is the attention that `unet.attn_processors` has there; the middle block comes last."""
    file = adapter(tiny_base, tmp_path, "faceid", lora=4)
    version = publish(based, file)
    record = read_record(based.record_path(version))
    tensors = read_tensors(file, read_header(file))
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_base / "unet", local_files_only=True)
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    assert names[-1].startswith("mid_block.")
    assert set(record.keys) == {f"unet.{name}" for name in names[1::2]}
    for index, name in enumerate(names):
        module = record.lora[f"unet.{name}.to_out.0"]
        assert (module.up == tensors[f"ip_adapter.{index}.to_out_lora.up.weight"]).all()
        assert module.scale == 1
        if index % 2:
            assert (record.keys[f"unet.{name}"] == tensors[f"ip_adapter.{index}.to_k_ip.weight"]).all()
            assert (record.values[f"unet.{name}"] == tensors[f"ip_adapter.{index}.to_v_ip.weight"]).all()
    found = compatibility(version)
    assert found.attentions == {f"unet.{name}": unet.get_submodule(name).to_k.out_features for name in names[1::2]}
    assert found.lora is not None
    assert len(found.lora.ranks) == 4 * len(names)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_record_is_read_as_written(based: Registry, file: Path, tmp_path: Path, dtype: type) -> None:
    tensors = read_tensors(file, read_header(file))
    rewrite(file, {name: values.astype(dtype) for name, values in tensors.items()})
    path = based.record_path(publish(based, file))
    record = read_record(path)
    assert write_record(record) == path.read_bytes()
    assert {values.dtype for values in (*record.projection.values(), *record.keys.values())} == {np.dtype(dtype)}
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes().replace(b"scumble.ip_adapter.1", b"scumble.ip_adapter.9"))
    with pytest.raises(IntegrityError, match="not an IP-Adapter's record"):
        read_record(damaged)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_other_spellings_become_the_same_record(based: Registry, tiny_base: Path, tmp_path: Path, kind: str) -> None:
    file = adapter(tiny_base, tmp_path, kind)
    first = publish(based, file).manifest
    tensors = read_tensors(file, read_header(file))
    spelled = {
        name.replace("ip_adapter.", "adapter_modules.").replace("image_proj.", "image_proj_model."): values
        for name, values in tensors.items()
    }
    (tmp_path / "training.safetensors").write_bytes(write(spelled, {}))
    (tmp_path / "diffusers.safetensors").write_bytes(write(tiny_ip.as_diffusers_writes(tensors), {}))
    for name in ("training", "diffusers"):
        assert publish(based, tmp_path / f"{name}.safetensors", f"ip/{name}").manifest.record == first.record


@pytest.mark.parametrize(
    ("name", "metadata", "shortcut"),
    [
        ("ip-adapter-faceid-plusv2_sd15.safetensors", {}, True),
        ("ip-adapter-FaceID-PlusV2.safetensors", {}, True),
        ("ip-adapter-faceid-plus_sd15.safetensors", {}, False),
        ("renamed.safetensors", {"shortcut": "true"}, True),
        ("plusv2.safetensors", {"shortcut": "false"}, False),
    ],
)
def test_the_shortcut_of_plusv2(
    based: Registry, tiny_base: Path, tmp_path: Path, name: str, metadata: dict[str, str], shortcut: bool
) -> None:
    file = rewrite(adapter(tiny_base, tmp_path, "faceid_plus", name), {}, metadata)
    version = publish(based, file)
    assert compatibility(version).shortcut is shortcut
    based.pull("ip/a", tmp_path / "out")
    (pulled,) = (tmp_path / "out").iterdir()
    assert publish(based, pulled).digest == version.digest, "what was pulled publishes as what it was"


@pytest.mark.parametrize("shortcut", [True, False])
def test_the_publishers_word_on_the_shortcut_goes_first(
    based: Registry, tiny_base: Path, tmp_path: Path, *, shortcut: bool
) -> None:
    file = adapter(tiny_base, tmp_path, "faceid_plus", "plusv2.safetensors")
    version = publish(based, file, hints=Hints(shortcut=shortcut))
    assert compatibility(version).shortcut is shortcut
    with pytest.raises(InvalidRequest, match="leave --shortcut out"):
        publish(based, adapter(tiny_base, tmp_path, "plus"), hints=Hints(shortcut=shortcut))


def test_instantids_file_reads_faces(based: Registry, tiny_base: Path, tmp_path: Path) -> None:
    found = compatibility(publish(based, adapter(tiny_base, tmp_path, "instantid", tokens=16)))
    assert (found.projection, found.tokens, found.picture_width, found.embedding_width) == (
        "face_resampler",
        16,
        None,
        512,
    )


def test_a_training_checkpoints_unet_may_be_left_out(based: Registry, tiny_base: Path, tmp_path: Path) -> None:
    file = adapter(tiny_base, tmp_path, "base")
    whole = rewrite(file, {"unet.conv_in.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(Refused, match=r"unet\.conv_in\.weight"):
        publish(based, whole)
    assert publish(based, whole, allow_leftover=True).manifest.leftover == ("unet.conv_in.weight",)


def test_nobody_else_has_a_shortcut(based: Registry, tiny_base: Path, tmp_path: Path) -> None:
    assert not compatibility(publish(based, adapter(tiny_base, tmp_path, "plus", "plusv2.safetensors"))).shortcut


def test_without_a_base_it_cannot_be_read(based: Registry, file: Path) -> None:
    with pytest.raises(Refused, match="publish it with --base REF"):
        based.publish(file, "ip/a")


def test_another_base_does_not_fit(based: Registry, file: Path, make_tiny_base: Any, tmp_path: Path) -> None:
    based.publish(make_tiny_base(tmp_path / "wide", width=24), "tiny/wide")
    with pytest.raises(Incompatible, match=r"down_blocks.*width 16 in the IP-Adapter and 24 in this sd1 base"):
        based.publish(file, "ip/a", base="tiny/wide")


ODD = np.ones((3, 5), np.float32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_proj.extra": ODD}, r"image_proj\.extra"),
        ({"ip_adapter.1.to_q_ip.weight": ODD}, r"ip_adapter\.1\.to_q_ip"),
        ({"ip_adapter.2.to_k_ip.weight": ODD}, r"ip_adapter\.2\.to_k_ip"),
        ({"unet.conv_in.weight": ODD}, r"unet\.conv_in\.weight"),
        ({"ip_adapter.99.to_k_ip.weight": ODD}, "attention 99, but this sd1 base has only 8"),
        ({"ip_adapter.1.to_k_ip.weight": ODD}, "do not fit the image's tokens"),
        ({"ip_adapter.1.to_v_ip.weight": None}, "only one of to_k_ip and to_v_ip"),
        ({"ip_adapter.1.to_k_ip.weight": None, "ip_adapter.1.to_v_ip.weight": None}, "None in the IP-Adapter"),
        ({"ip_adapter.0.to_q_lora.down.weight": ODD}, "only one of down and up"),
        ({"image_proj.norm.weight": None}, r"lacks image_proj\.norm\.weight"),
        ({"image_proj.proj.bias": ODD}, r"image_proj\.proj\.bias has shape"),
        ({"image_proj.proj.weight": None, "image_proj.proj.bias": None}, "no known kind"),
        ({"image_proj.norm.bias": np.full(32, np.nan, np.float32)}, "NaN"),
        ({"image_proj.norm.bias": np.ones(32, np.int64)}, "I64"),
    ],
)
def test_what_is_no_sound_ip_adapter_is_refused(
    based: Registry, file: Path, change: dict[str, Array | None], says: str
) -> None:
    with pytest.raises(Refused, match=says):
        publish(based, rewrite(file, change))
    assert based.names() == ("tiny/base",)


def test_a_folder_brings_its_image_encoder(based: Registry, tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    adapter(tiny_base, folder, "plus")
    tiny_ip.make_image_encoder(folder / "image_encoder", preparation=True)
    (folder / "README.md").write_text("# Pictures as prompts")
    version = publish(based, folder)
    encoder = compatibility(version).encoder
    assert encoder == ImageEncoderCompatibility(hidden_size=48, projection_dim=40, image_size=32, patch_size=8)
    assert "image_encoder/preprocessor_config.json" in version.manifest.files
    assert version.manifest.image_encoder is None


def test_two_ip_adapters_in_a_folder_are_refused(based: Registry, tiny_base: Path, tmp_path: Path) -> None:
    for kind in ("base", "plus"):
        adapter(tiny_base, tmp_path / "models", kind, f"{kind}.safetensors")
    with pytest.raises(Refused, match="holds 2 IP-Adapters"):
        publish(based, tmp_path / "models")


def test_an_image_encoder_is_named_by_digest(based: Registry, file: Path, tmp_path: Path) -> None:
    encoder = based.publish(tiny_ip.make_image_encoder(tmp_path / "vit"), "vision/vit")
    assert encoder.manifest.kind == "image_encoder"
    version = publish(based, file, image_encoder="vision/vit")
    assert version.manifest.image_encoder == encoder.digest
    assert based.resolve_digest(encoder.digest).ref == "vision/vit@1"
    based.set_status("vision/vit@1", "quarantined")
    with pytest.raises(Refused, match="quarantined"):
        based.resolve_digest(encoder.digest)
    with pytest.raises(NotFound, match="nothing with digest"):
        based.resolve_digest("sha256:" + "0" * 64)


def test_manifests_without_an_image_encoder_are_what_they_were(based: Registry, file: Path) -> None:
    for version in (based.find("tiny/base"), publish(based, file)):
        assert "image_encoder" not in json.loads(version.manifest.canonical())


def test_an_image_encoder_that_does_not_fit(
    based: Registry, file: Path, lora: Path, tiny_base: Path, tmp_path: Path
) -> None:
    face = adapter(tiny_base, tmp_path, "faceid", "face.safetensors")
    folder = tmp_path / "entry"
    adapter(tiny_base, folder, "base")
    tiny_ip.make_image_encoder(folder / "image_encoder")
    based.publish(folder / "image_encoder", "vision/vit")
    with pytest.raises(InvalidRequest, match="of its own"):
        publish(based, folder, image_encoder="vision/vit")
    with pytest.raises(Incompatible, match="reads embeddings, not pictures"):
        publish(based, face, image_encoder="vision/vit")
    with pytest.raises(InvalidRequest, match="a lora uses no image encoder"):
        based.publish(lora, "ip/a", image_encoder="vision/vit")
    with pytest.raises(Refused, match="a base is not an image encoder"):
        publish(based, file, image_encoder="tiny/base")
    tensors = read_tensors(file, read_header(file))
    rewrite(file, {"image_proj.proj.weight": tensors["image_proj.proj.weight"][:, :30]})
    with pytest.raises(Incompatible, match="at width 30, but this image encoder gives 40"):
        publish(based, file, image_encoder="vision/vit")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("config.json", {"hidden_size": 64}, "hidden_size = 64, but the weights have 48"),
        ("config.json", {"image_size": 224}, "image_size = 224, but the weights have 32"),
        ("preprocessor_config.json", {"crop_size": 224}, "crops images to 224"),
    ],
)
def test_an_image_encoder_whose_parts_disagree(
    based: Registry, tmp_path: Path, name: str, change: dict[str, Any], says: str
) -> None:
    folder = tiny_ip.make_image_encoder(tmp_path / "vit", preparation=True)
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | change))
    with pytest.raises(Refused, match=says):
        based.publish(folder, "vision/vit")


def test_an_image_encoder_stands_alone(based: Registry, tmp_path: Path) -> None:
    folder = tiny_ip.make_image_encoder(tmp_path / "vit")
    with pytest.raises(InvalidRequest, match="leave --base out"):
        based.publish(folder, "vision/vit", base="tiny/base")
    (folder / "model.safetensors").unlink()
    with pytest.raises(Refused, match=r"lacks model\.safetensors"):
        based.publish(folder, "vision/vit")


def test_on_the_command_line(
    based: Registry, home: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: object) -> str:
        with pytest.raises(SystemExit, match="0"):
            run(["registry", *map(str, arguments), "--home", str(home)])
        return capsys.readouterr().out

    command("publish", tiny_ip.make_image_encoder(tmp_path / "vit"), "--name", "vision/vit")
    command("publish", file, "--name", "ip/a", "--base", "tiny/base", "--image-encoder", "vision/vit")
    digest = based.find("vision/vit").digest
    assert based.find("ip/a").manifest.image_encoder == digest
    assert "image encoder" in command("show", "ip/a")
