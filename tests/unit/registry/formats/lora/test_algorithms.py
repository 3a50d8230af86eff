"""What becomes of each module, and what is refused by name. Other people's code is asked in `server/formats/`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scumble.errors import Incompatible, Refused
from scumble_registry import Registry, formats
from scumble_registry.formats.lora import LoraModule, LoraRecord, read_record
from scumble_registry.formats.lora.export import export
from scumble_registry.formats.lora.record import Dense, Gain, Kronecker, Product, Rotation, make_module
from scumble_registry.formats.safetensors_header import write
from scumble_registry.formats.source import Source
from scumble_registry.formats.stable_diffusion import stable_diffusion

BaseWriter = Callable[..., Path]
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV, NORM = "lora_unet_conv_in", "lora_unet_down_blocks_0_attentions_0_norm"


def draw(*shape: int) -> Any:
    return np.random.default_rng(len(shape) + sum(shape)).normal(size=shape).astype(np.float32)


@pytest.fixture
def published(registry: Registry, base: Path, tmp_path: Path) -> Callable[..., LoraRecord]:
    """Tensors in kohya's spelling, published for the base → the record."""
    registry.publish(base, "demo/base")

    def publish(tensors: dict[str, Any], **options: Any) -> LoraRecord:
        path = tmp_path / "lora.safetensors"
        path.write_bytes(write(tensors, {}))
        version = registry.publish(path, "styles/ink", base="demo/base", **options)
        assert version.manifest.compatibility.requires.keys() == version.manifest.compatibility.ranks.keys() | set(
            version.manifest.compatibility.merged
        )
        return read_record(registry.record_path(version))

    return publish


def loha(rank: int, key: str = KOHYA_TO_Q) -> dict[str, Any]:
    return {
        f"{key}.hada_w1_a": draw(4, rank),
        f"{key}.hada_w1_b": draw(rank, 4),
        f"{key}.hada_w2_a": draw(4, rank) + 1,
        f"{key}.hada_w2_b": draw(rank, 4) + 1,
    }


def test_a_product_of_low_rank_becomes_factors_and_one_of_high_rank_stays(published: Any) -> None:
    assert isinstance(published(loha(1))[TO_Q], LoraModule)
    assert isinstance(published(loha(2))[TO_Q], Product)


def test_a_kronecker_product_of_whole_halves_has_scale_one_whatever_alpha_says(published: Any) -> None:
    left, right = draw(2, 2), draw(2, 2)
    module = published({f"{KOHYA_TO_Q}.lokr_w1": left, f"{KOHYA_TO_Q}.lokr_w2": right, f"{KOHYA_TO_Q}.alpha": draw()})
    assert isinstance(module[TO_Q], Kronecker)
    np.testing.assert_allclose(np.kron(module[TO_Q].left, module[TO_Q].right), np.kron(left, right), rtol=1e-6)


def test_a_scale_goes_before_alpha(published: Any) -> None:
    tensors = {f"{KOHYA_TO_Q}.lora_down.weight": draw(2, 4), f"{KOHYA_TO_Q}.lora_up.weight": draw(4, 2)}
    tensors |= {f"{KOHYA_TO_Q}.alpha": np.float32(8), f"{KOHYA_TO_Q}.scale": np.float32(0.25)}
    assert published({name: np.asarray(values) for name, values in tensors.items()})[TO_Q].scale == 0.25


def test_whole_numbers_may_be_alphas_and_switches(published: Any) -> None:
    tensors = {f"{KOHYA_TO_Q}.weight": draw(4), f"{KOHYA_TO_Q}.on_input": np.asarray(1)}
    found = published(tensors)[TO_Q]
    assert isinstance(found, Gain)
    assert found.axis == 1
    pair = {f"{CONV}.lora_down.weight": draw(2, 4, 3, 3), f"{CONV}.lora_up.weight": draw(4, 2, 1, 1)}
    assert published(pair | {f"{CONV}.alpha": np.asarray(1)})["unet.conv_in"].scale == 0.5


def test_norms_and_biases_are_merged(published: Any, registry: Registry) -> None:
    tensors = {f"{NORM}.w_norm": draw(4), f"{NORM}.b_norm": draw(4), f"{CONV}.diff_b": draw(4)}
    found = published(tensors)
    assert isinstance(found["unet.down_blocks.0.attentions.0.norm"], Dense)
    assert found["unet.conv_in"].delta is None
    manifest = registry.resolve("styles/ink").manifest
    assert manifest.compatibility.merged == ("unet.conv_in", "unet.down_blocks.0.attentions.0.norm")
    assert manifest.compatibility.ranks == {}


@pytest.mark.parametrize(
    ("key", "shape", "target"),
    [
        (f"{NORM}.w_norm", (4,), "unet.down_blocks.0.attentions.0.norm"),
        (f"{NORM}.b_norm", (4,), "unet.down_blocks.0.attentions.0.norm"),
        ("lora_te_text_model_final_layer_norm.w_norm", (8,), "text_encoder.text_model.final_layer_norm"),
        ("unet.conv_norm_out.diff", (4,), "unet.conv_norm_out"),
        ("diffusion_model.out.0.diff_b", (4,), "unet.conv_norm_out"),
        ("base_model.model.text_model.final_layer_norm.w_norm", (8,), "text_encoder.text_model.final_layer_norm"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.diff", (8, 8), None),
        (f"{CONV}.diff_b", (4,), "unet.conv_in"),
    ],
)
def test_a_file_of_one_key_is_no_embedding(
    published: Any, key: str, shape: tuple[int, ...], target: str | None
) -> None:
    assert set(published({key: draw(*shape)})) == {target or key.removesuffix(".diff")}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"{KOHYA_TO_Q}.oft_blocks": draw(3, 2, 2)}, "do not rotate 4 rows"),
        ({f"{KOHYA_TO_Q}.oft_blocks": draw(2, 2, 3)}, "are not square"),
        ({f"{KOHYA_TO_Q}.oft_blocks": draw(2, 2, 2), f"{KOHYA_TO_Q}.rescale": draw(3)}, "3 scales for 4 rows"),
        ({f"{KOHYA_TO_Q}.weight": draw(3), f"{KOHYA_TO_Q}.on_input": np.asarray(0)}, "3 gains for 4 rows"),
        ({f"{KOHYA_TO_Q}.diff": draw(4, 4, 2)}, "fits no weight"),
        ({f"{CONV}.diff": draw(4, 4, 3, 3), f"{CONV}.diff_b": draw(5)}, "a bias of shape"),
        ({**loha(2), f"{KOHYA_TO_Q}.hada_w2_b": draw(2, 5)}, "of different shapes"),
        ({**loha(2), f"{KOHYA_TO_Q}.hada_w1_b": draw(3, 4)}, "no factors of one matrix"),
        ({**loha(2), f"{KOHYA_TO_Q}.hada_t1": draw(2, 2)}, "no factors of one kernel"),
        ({**loha(2), f"{KOHYA_TO_Q}.alpha": np.float32(1e6)}, "within"),
        ({**loha(2), f"{KOHYA_TO_Q}.alpha": draw(2)}, "one number"),
        ({**loha(2), f"{KOHYA_TO_Q}.dora_scale": draw(5, 1)}, "magnitudes of shape"),
        (
            {f"{KOHYA_TO_Q}.lokr_w1": draw(1, 1), f"{KOHYA_TO_Q}.lokr_w2_a": np.zeros((200_000, 1), np.float16)}
            | {f"{KOHYA_TO_Q}.lokr_w2_b": np.zeros((1, 200_000), np.float16)},
            "more than its weight can be",
        ),
        (
            {f"{CONV}.lora_down.weight": np.zeros((1, 100_000), np.float16), f"{CONV}.lora_up.weight": draw(4, 1)}
            | {f"{CONV}.lora_mid.weight": np.zeros((1, 1, 500, 500), np.float16)},
            "more than its weight can be",
        ),
        ({f"{KOHYA_TO_Q}.oft_blocks": np.zeros((1, 2000, 2000), np.float16)}, "more than its weight can be"),
        ({f"{KOHYA_TO_Q}.lokr_w1": draw(2), f"{KOHYA_TO_Q}.lokr_w2": draw(2, 2)}, "is no matrix"),
        ({f"{KOHYA_TO_Q}.lokr_w1": draw(2, 2), f"{KOHYA_TO_Q}.alpha": draw()}, "lacks lokr_w2_a"),
        (
            {f"{CONV}.lora_down.weight": draw(2, 4, 3, 3), f"{CONV}.lora_up.weight": draw(4, 3, 1, 1)}
            | {f"{CONV}.lora_mid.weight": draw(3, 2, 3, 3)},
            "does not fit after",
        ),
        ({f"{KOHYA_TO_Q}.{n}.weight": draw(2, 2) for n in ("a1", "a2", "b1", "b2")}, "as 2x2"),
        (
            {f"{KOHYA_TO_Q}.{n}.weight": draw(2, 2, 3, 3) for n in ("a1", "a2", "b1", "b2")},
            "only b2 has a kernel",
        ),
        (
            {f"{KOHYA_TO_Q}.a1.weight": draw(4, 3), f"{KOHYA_TO_Q}.a2.weight": draw(3, 4)}
            | {f"{KOHYA_TO_Q}.b1.weight": draw(2, 4), f"{KOHYA_TO_Q}.b2.weight": draw(4, 2)},
            "do not fit an input|no factors of one matrix",
        ),
        (
            {f"{KOHYA_TO_Q}.lora_down.weight": draw(2, 4) * 1e3, f"{KOHYA_TO_Q}.lora_up.weight": draw(4, 2) * 1e3},
            "beyond half precision",
        ),
    ],
)
def test_what_is_not_sound_is_refused(published: Any, registry: Registry, tensors: dict[str, Any], says: str) -> None:
    with pytest.raises((Refused, Incompatible), match=says):
        published({name: np.asarray(values) for name, values in tensors.items()})
    assert registry.names() == ("demo/base",)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("lora_transformer_single_transformer_blocks_0_proj_out.lora_down.weight", "diffusion transformer"),
        ("lora_prior_unet_blocks_0.lora_up.weight", "Stable Cascade"),
        (f"{KOHYA_TO_Q}.lambda_layer", "T-LoRA"),
        ("base_model.model.to_q.vera_lambda_b", "VeRA"),
        ("base_model.model.to_q.fourierft_spectrum", "FourierFT"),
        ("bundle_emb.ink.string_to_param.*", "publish each as an embedding of its own"),
        (f"{KOHYA_TO_Q}.set_weight", "publish a checkpoint"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.proj_in.lora_A.weight", "video model"),
        (f"{KOHYA_TO_Q}.diff_b", "cannot be served"),
        (f"{KOHYA_TO_Q}.reference", "cannot be served"),
    ],
)
def test_relatives_are_refused_by_their_names(published: Any, key: str, says: str) -> None:
    """Beside a module that is sound."""
    sound = {f"{CONV}.lora_down.weight": draw(2, 4, 3, 3), f"{CONV}.lora_up.weight": draw(4, 2, 1, 1)}
    with pytest.raises(Refused, match=says) as caught:
        published(sound | {key: draw(4)})
    assert caught.value.fields["keys"] == [key]


def drafted(path: Path, base: Any = None, **options: Any) -> Any:
    source = Source.scan(path)
    compatibility = base.as_base() if base is not None else None
    return formats.read(Source(source.path, source.files, **options), compatibility)


def test_a_publisher_may_leave_out_what_is_not_understood(registry: Registry, base: Path, tmp_path: Path) -> None:
    manifest = registry.publish(base, "demo/base").manifest
    path = tmp_path / "a.safetensors"
    sound = {f"{CONV}.lora_down.weight": draw(2, 4, 3, 3), f"{CONV}.lora_up.weight": draw(4, 2, 1, 1)}
    path.write_bytes(write(sound | {"bundle_emb.ink.emb_params": draw(2, 8)}, {}))
    draft = drafted(path, manifest, allow_leftover=True)
    assert draft.leftover == ("bundle_emb.ink.emb_params",)
    assert draft.compatibility.ranks == {"unet.conv_in": 2}
    path.write_bytes(write({"lora_unet_nowhere.lora_down.weight": draw(2, 4)}, {}))
    with pytest.raises(Refused, match="not understood"):
        drafted(path, manifest, allow_leftover=True)


def test_what_a_file_tells(registry: Registry, base: Path, tmp_path: Path) -> None:
    manifest = registry.publish(base, "demo/base").manifest
    path = tmp_path / "ink.safetensors"
    tensors = {f"{CONV}.lora_down.weight": draw(2, 4, 3, 3), f"{CONV}.lora_up.weight": draw(4, 2, 1, 1)}
    tensors |= {**loha(2), f"{KOHYA_TO_Q}.alpha": np.asarray(1.0, np.float32)}
    q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= {f"{q}.lora_down.weight": draw(1, 8), f"{q}.lora_up.weight": draw(8, 1), f"{q}.dora_scale": draw(8, 1)}
    path.write_bytes(write(tensors, {"ss_base_model_version": "sd_v1"}))
    draft = drafted(path, manifest)
    assert draft.dialect == "kohya"
    assert draft.details["counts"] == {
        "components": {"text_encoder": 1, "unet": 2},
        "algorithms": {"LoHa": 1, "LoRA": 2},
        "serving": {"row": 1, "row with gain": 1, "variant": 1},
    }
    assert draft.details["modules"]["unet.conv_in"] == {"algorithm": "LoRA", "serving": "row", "rank": 2, "alpha": 2.0}
    assert draft.details["modules"][TO_Q] == {"algorithm": "LoHa", "serving": "variant"}
    assert draft.details["family"] == {"rests_on": "the base", "header_says": "sd1"}
    json.dumps(draft.details)


def test_the_family_needs_no_base_where_the_width_of_the_text_tells(tmp_path: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora"
    path = tmp_path / "a.safetensors"
    path.write_bytes(write({f"{name}.down.weight": draw(1, 2048), f"{name}.up.weight": draw(8, 1)}, {}))
    draft = drafted(path)
    assert draft.compatibility.family == "sdxl"
    assert draft.dialect == "diffusers, without prefix"


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_kohyas_names_of_the_real_sizes_are_read_without_a_base(tmp_path: Path, family: Any) -> None:
    targets = {
        name: shape
        for name, shape in stable_diffusion(family).targets.items()
        if "attentions.0" in name or "mlp" in name
    }
    path = tmp_path / "a.safetensors"
    record: LoraRecord = {
        name: make_module(name, np.ones((1, shape[1]), np.float16), np.ones((shape[0], 1), np.float16), 1.0)
        for name, shape in targets.items()
    }
    export(record, "kohya", tmp_path, base=stable_diffusion(family))
    (tmp_path / "pytorch_lora_weights.safetensors").rename(path)
    draft = drafted(path)
    assert draft.compatibility.family == family
    assert draft.compatibility.requires.keys() == targets.keys()
    assert draft.details["family"]["rests_on"] == "its modules"


def test_several_adapters_in_one_dump_are_refused_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        f"base_model.model.mid_block.to_q.lora_{side}.{name}.weight": draw(2, 2) for side in "AB" for name in ("a", "b")
    }
    path.write_bytes(write(tensors, {}))
    with pytest.raises(Refused, match="2 adapters, a, b"):
        drafted(path)


def test_two_spellings_of_one_module_are_refused(published: Any) -> None:
    tensors = {}
    for key in ("lora_unet_conv_in", "lora_unet_input_blocks_0_0"):
        tensors |= {f"{key}.lora_down.weight": draw(2, 4, 3, 3), f"{key}.lora_up.weight": draw(4, 2, 1, 1)}
    with pytest.raises(Refused, match="twice"):
        published(tensors)


def test_a_butterfly_of_one_stage_is_a_rotation_of_blocks(published: Any) -> None:
    found = published({f"{KOHYA_TO_Q}.oft_blocks": draw(1, 2, 2, 2)})[TO_Q]
    assert isinstance(found, Rotation)
    assert found.blocks.shape == (1, 2, 2, 2)
