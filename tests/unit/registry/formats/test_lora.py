"""The two dialects and the record. PEFT itself is asked in `lora/test_peft.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scumble.errors import Incompatible, Refused
from scumble_registry import Registry, formats
from scumble_registry.formats.lora import LoraRecord, read_record
from scumble_registry.formats.safetensors_header import write
from scumble_registry.formats.source import Source

LoraWriter = Callable[..., Path]
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
KOHYA_TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KOHYA_CONV = "lora_unet_conv_in"
DTYPES = [np.dtype("<f4"), np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16)]


def published(registry: Registry, file: Path, **options: Any) -> LoraRecord:
    return read_record(registry.record_path(registry.publish(file, "styles/ink", **options)))


def metadata(**config: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({key.replace("__", "."): v for key, v in config.items()})}


def test_without_metadata_the_scale_is_one(registry: Registry, write_lora: LoraWriter) -> None:
    record = published(registry, write_lora(rank=3))
    assert list(record) == [Q_PROJ, TO_Q]
    assert {module.scale for module in record.values()} == {1.0}
    assert record[Q_PROJ].shape == (8, 8)


def test_alpha_comes_from_the_metadata_per_component_and_pattern(registry: Registry, write_lora: LoraWriter) -> None:
    file = write_lora(
        rank=2,
        metadata=metadata(
            unet__r=8, unet__lora_alpha=4, unet__rank_pattern={"to_q": 2}, unet__alpha_pattern={"attn1.to_q": 6}
        ),
    )
    record = published(registry, file)
    assert record[TO_Q].scale == 3.0
    assert record[Q_PROJ].scale == 1.0


def test_rank_stabilised_alpha_is_divided_by_the_root_of_the_rank(registry: Registry, write_lora: LoraWriter) -> None:
    file = write_lora(rank=4, metadata=metadata(unet__r=4, unet__lora_alpha=6, unet__use_rslora=True))
    assert published(registry, file)[TO_Q].scale == 3.0


def test_both_spellings_of_the_text_encoder_are_one_target(
    registry: Registry, write_lora: LoraWriter, tmp_path: Path
) -> None:
    flat = {
        f"text_encoder.encoder.layers.0.self_attn.q_proj.lora_{side}.weight": np.ones((2, 2), np.float32)
        for side in "AB"
    }
    path = tmp_path / "flat.safetensors"
    path.write_bytes(write(flat, {}))
    assert list(published(registry, path)) == [Q_PROJ]
    with pytest.raises(Refused, match="twice"):
        published(registry, write_lora("both.safetensors", tensors=flat))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"unet__r": 8}, "has rank 8, but the tensors have rank 2"),
        ({"unet__lora_alpha": 0}, "lora_alpha is 0"),
        ({"unet__lora_alpha": "4"}, "wrong type"),
        ({"unet__lora_alpha": True}, "wrong type"),
        ({"unet__lora_alpha": 1e9}, "alpha/rank"),
        ({"unet__alpha_pattern": {"(a+)+$": 4}}, "too complex"),
        ({"unet__alpha_pattern": {".*.*.*x": 4}}, "too complex"),
        ({"unet__alpha_pattern": {"(": 4}}, "no regular expression"),
        ({"unet__alpha_pattern": {"to_q": "4"}}, "not a number"),
        ({"unet__alpha_pattern": [4]}, "wrong type"),
    ],
)
def test_metadata_that_cannot_be_followed_is_refused(
    registry: Registry, write_lora: LoraWriter, config: dict[str, Any], says: str
) -> None:
    with pytest.raises(Refused, match=says):
        registry.publish(write_lora(metadata=metadata(**config)), "styles/ink")


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_metadata_that_is_no_json_object_is_refused(registry: Registry, write_lora: LoraWriter, text: str) -> None:
    with pytest.raises(Refused, match="lora_adapter_metadata"):
        registry.publish(write_lora(metadata={"lora_adapter_metadata": text}), "styles/ink")


@pytest.mark.parametrize(
    "key",
    [
        f"{TO_Q}.lora_embedding_A",
        f"{TO_Q}.lora_B.bias",
        "unet.mid_block.attentions.0.proj_in.lora_A.weight",
        "transformer.to_q.lora_A.weight",
        "down_blocks.0.attn1.processor.to_q_lora.down.weight",
        "base_model.model.to_q.lora_A.weight",
        "something.else",
    ],
)
def test_a_key_that_is_not_understood_is_refused_by_name(registry: Registry, write_lora: LoraWriter, key: str) -> None:
    file = write_lora(tensors={key: np.ones((2, 2), np.float32)})
    with pytest.raises(Refused, match="nothing was published") as caught:
        registry.publish(file, "styles/ink")
    assert caught.value.fields["keys"] == [key]
    assert registry.names() == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_no_numbers_are_refused(
    registry: Registry, write_lora: LoraWriter, value: float, dtype: Any
) -> None:
    bad = np.array([[value, 0, 0, 0]], dtype=dtype)
    with pytest.raises(Refused, match="NaN or infinite"):
        registry.publish(write_lora(tensors={f"{TO_Q}.lora_A.weight": bad}), "styles/ink")


@pytest.mark.parametrize("shape", [(4, 3), (4,), (4, 2, 1, 1), (0, 2), (4, 2, 3, 3)])
def test_factors_that_do_not_belong_together_are_refused(
    registry: Registry, write_lora: LoraWriter, shape: tuple[int, ...]
) -> None:
    file = write_lora(tensors={f"{TO_Q}.lora_B.weight": np.ones(shape, np.float32)})
    with pytest.raises(Refused, match="factor"):
        registry.publish(file, "styles/ink")


def test_whole_numbers_are_no_lora(registry: Registry, write_lora: LoraWriter) -> None:
    with pytest.raises(Refused, match="F32, F16 or BF16"):
        registry.publish(write_lora(tensors={f"{TO_Q}.lora_A.weight": np.ones((2, 4), np.int8)}), "styles/ink")


def test_the_base_is_checked_and_remembered(registry: Registry, base: Path, lora: Path) -> None:
    demo = registry.publish(base, "demo/base")
    manifest = registry.publish(lora, "styles/ink", base="demo/base").manifest
    assert manifest.base == demo.digest
    assert manifest.compatibility.family == "sd1"
    manifest.fits(demo.manifest)
    with pytest.raises(Refused, match="not a base"):
        registry.publish(lora, "styles/other", base="styles/ink")


def test_a_lora_that_does_not_fit_names_the_first_target_and_both_shapes(
    registry: Registry, base: Path, write_lora: LoraWriter
) -> None:
    registry.publish(base, "demo/base")
    wide = {
        f"{TO_Q}.lora_A.weight": np.ones((2, 320), np.float32),
        f"{TO_Q}.lora_B.weight": np.ones((320, 2), np.float32),
    }
    with pytest.raises(Incompatible, match=rf"{TO_Q} as 320x320, but in this sd1 base it is 4x4") as caught:
        registry.publish(write_lora(tensors=wide), "styles/ink", base="demo/base")
    assert caught.value.exit_status == 4
    assert caught.value.fields == {"target": TO_Q, "adapter_shape": (320, 320), "base_shape": (4, 4)}
    other = {f"unet.elsewhere.lora_{side}.weight": np.ones((2, 2), np.float32) for side in "AB"}
    with pytest.raises(Incompatible, match=r"changes unet\.elsewhere 2x2, which this sd1 base does not have"):
        registry.publish(write_lora(tensors=other), "styles/ink", base="demo/base")
    assert registry.names() == ("demo/base",)


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (96, None)])
def test_without_a_base_the_family_is_read_from_the_width_of_the_text(
    registry: Registry, tmp_path: Path, width: int, family: str | None
) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {
        f"{name}.lora_A.weight": np.ones((1, width), np.float16),
        f"{name}.lora_B.weight": np.ones((8, 1), np.float16),
    }
    path = tmp_path / "lora.safetensors"
    path.write_bytes(write(tensors, {}))
    assert registry.publish(path, "styles/ink").manifest.compatibility.family == family


def kohya(path: Path, alpha: float | None = 1.0, **more: Any) -> Path:
    tensors: dict[str, Any] = {
        f"{KOHYA_TO_Q}.lora_down.weight": np.ones((2, 4), np.float16),
        f"{KOHYA_TO_Q}.lora_up.weight": np.ones((4, 2), np.float16),
        f"{KOHYA_CONV}.lora_down.weight": np.ones((2, 4, 3, 3), np.float16),
        f"{KOHYA_CONV}.lora_up.weight": np.ones((4, 2, 1, 1), np.float16),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": np.ones((1, 8), np.float16),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": np.ones((8, 1), np.float16),
    }
    if alpha is not None:
        tensors[f"{KOHYA_TO_Q}.alpha"] = np.array(alpha, np.float16)
    path.write_bytes(write(tensors | more, {"ss_network_dim": "2"}))
    return path


def test_kohyas_names_are_looked_up_in_the_base(registry: Registry, base: Path, tmp_path: Path) -> None:
    registry.publish(base, "demo/base")
    record = published(registry, kohya(tmp_path / "k.safetensors"), base="demo/base")
    assert list(record) == [Q_PROJ, "unet.conv_in", TO_Q]
    assert record[TO_Q].scale == 0.5
    assert record["unet.conv_in"].shape == (4, 4, 3, 3)
    assert record["unet.conv_in"].scale == 1.0


@pytest.mark.parametrize("alpha", [None, 0.0, 2.0])
def test_no_alpha_and_alpha_zero_mean_the_rank(
    registry: Registry, base: Path, tmp_path: Path, alpha: float | None
) -> None:
    registry.publish(base, "demo/base")
    assert published(registry, kohya(tmp_path / "k", alpha), base="demo/base")[TO_Q].alpha == 2.0


def test_kohyas_layout_needs_the_base(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="publish it with --base"):
        registry.publish(kohya(tmp_path / "k.safetensors"), "styles/ink")


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_down_blocks_9_attn1_to_q.lora_down.weight",
        f"{KOHYA_TO_Q}.hada_w1_a",
        f"{KOHYA_TO_Q}.lambda_layer",
        "lora_unet_input_blocks_4_1_proj_in.alpha",
    ],
)
def test_a_kohya_key_that_is_not_understood_is_refused_by_name(
    registry: Registry, base: Path, tmp_path: Path, key: str
) -> None:
    registry.publish(base, "demo/base")
    file = kohya(tmp_path / "k.safetensors", **{key: np.ones((2, 2), np.float16)})
    with pytest.raises(Refused, match="nothing was published") as caught:
        registry.publish(file, "styles/ink", base="demo/base")
    assert caught.value.fields["keys"] == [key]


def test_trigger_words_come_from_the_publisher_or_else_from_the_file(
    registry: Registry, write_lora: LoraWriter
) -> None:
    file = write_lora(metadata={"modelspec.trigger_phrase": "ink wash, sumi-e"})
    assert registry.publish(file, "styles/ink").manifest.trigger_words == ("ink wash", "sumi-e")
    said = registry.publish(file, "styles/ink", trigger_words=["ink"])
    assert said.manifest.trigger_words == ("ink",)


def test_a_folder_with_one_lora_keeps_its_files(registry: Registry, lora: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lora.rename(folder / "ink.safetensors")
    (folder / "README.md").write_text("# Ink")
    version = registry.publish(folder, "styles/ink")
    assert sorted(version.manifest.files) == ["README.md", "ink.safetensors"]
    (folder / "second.safetensors").write_bytes((folder / "ink.safetensors").read_bytes())
    with pytest.raises(Refused, match="none of the kinds"):
        registry.publish(folder, "styles/ink")


def test_one_half_of_a_module_is_named_with_the_other(write_lora: LoraWriter) -> None:
    file = write_lora()
    tensors = load_file(file)
    gone = next(name for name in tensors if "lora_B" in name)
    save_file({name: values for name, values in tensors.items() if name != gone}, file)
    with pytest.raises(Refused, match="is one half of a LoRA module, whose other half") as caught:
        formats.read(Source.scan(file), None)
    assert gone in caught.value.message
    assert caught.value.fields["tensor"] == gone.replace("lora_B", "lora_A")


def test_a_peft_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(Refused, match=r"no adapter_model\.safetensors; put the weights beside it"):
        formats.read(Source.scan(tmp_path), None)


def test_a_byte_order_mark_before_a_config_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b'\xef\xbb\xbf{"r": 4}')
    assert Source.scan(tmp_path).json("adapter_config.json") == {"r": 4}


def test_unknown_weights_are_told_by_what_they_are(tmp_path: Path) -> None:
    save_file({f"foo.{index}": np.zeros((2, 3, 2), np.float32) for index in range(6)}, tmp_path / "a.safetensors")
    with pytest.raises(Refused) as caught:
        formats.read(Source.scan(tmp_path / "a.safetensors"), None)
    assert "6 tensors that no kind has (foo.0, foo.1, foo.2, foo.3 …)" in caught.value.message
    assert len(caught.value.message) < 300 + len(str(tmp_path))
