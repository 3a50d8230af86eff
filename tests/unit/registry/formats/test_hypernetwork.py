"""Hypernetworks of both kinds: layouts, what is derived, the records, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scumble.errors import Incompatible, IntegrityError, Refused
from scumble_registry import Registry
from scumble_registry.compatibility import ContextNetworks, HypernetworkCompatibility, WeightPredictor
from scumble_registry.formats.hypernetwork import context, context_record, predictor, read_record
from scumble_registry.formats.hypernetwork.context_record import ACTIVATIONS
from scumble_registry.formats.hypernetwork.predictor import PredictorConfig, PredictorRecord
from scumble_registry.formats.safetensors_header import Array, write

tiny_hypernetwork = pytest.importorskip("support.tiny_hypernetwork")

WIDTH, SELF = 8, 4  # of the text and of the hidden states in the base of conftest.py
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
RELU = {"activation_func": "relu"}


def save(path: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> Path:
    path.write_bytes(write(tensors, metadata))
    return path


def layers(width: int, *numbered: tuple[int, tuple[int, ...]], sides: str = "kv", seed: int = 0) -> dict[str, Array]:
    """`numbered` are places and weights' shapes."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for side in sides:
        for place, shape in numbered:
            name = f"{width}.{side}.linear.{place}"
            tensors[f"{name}.weight"] = draw.normal(size=shape).astype(np.float32)
            tensors[f"{name}.bias"] = draw.normal(size=shape[:1]).astype(np.float16)
    return tensors


def plain(width: int, second: int = 2) -> dict[str, Array]:
    """[1, 2, 1]; the second linear layer's number tells of an activation."""
    return layers(width, (0, (2 * width, width)), (second, (width, 2 * width)))


def config(**changes: Any) -> dict[str, Any]:
    fields = {"condition": "image", "width": 4, "heads": 2, "depth": 1, "passes": 2, "rank": 2, "a": 3, "b": 2}
    return {**fields, "alpha": 2.0, "targets": [TO_K, TO_Q], **changes}


def predictor_tensors(description: dict[str, Any], condition: int = 5) -> dict[str, Array]:
    parsed = PredictorConfig.model_validate(description)
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = dict(parsed.network_shapes(condition))
    for name in parsed.targets:
        shapes |= {f"aux.{name}.up": (4, parsed.a), f"aux.{name}.down": (parsed.b, 8 if name == TO_K else 4)}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def save_predictor(path: Path, description: dict[str, Any], **how: Any) -> Path:
    return save(path, predictor_tensors(description, **how), {predictor.CONFIG: json.dumps(description)})


def published(registry: Registry, file: Path, **options: Any) -> HypernetworkCompatibility:
    count = sum(name.startswith("h/") for name in registry.names())
    compatibility = registry.publish(file, f"h/{count}", **options).manifest.compatibility
    assert isinstance(compatibility, HypernetworkCompatibility)
    return compatibility


def test_what_is_derived_of_the_webuis_kind(registry: Registry, base: Path, tmp_path: Path) -> None:
    registry.publish(base, "demo/base")
    file = save(tmp_path / "a.safetensors", plain(SELF) | plain(WIDTH), {**RELU, "step": "9", "name": "ink"})
    found = published(registry, file, base="demo/base")
    assert found.family == "sd1"
    assert found.network == ContextNetworks(
        widths=(SELF, WIDTH), structure=(1, 2, 1), activation="relu", activate_output=True, layer_norm=False
    )
    version = registry.resolve("h/0")
    assert (version.manifest.kind, list(version.manifest.files)) == ("hypernetwork", ["hypernetwork.safetensors"])
    record = read_record(registry.record_path(version))
    assert isinstance(record, dict)
    first, last = record[WIDTH].v
    assert (first.activation, first.norm, first.weight.shape, first.bias.dtype) == ("relu", None, (16, 8), np.float16)
    assert (last.activation, last.weight.shape) == ("relu", (8, 16))
    assert context_record.write(record) == registry.record_path(version).read_bytes()
    registry.pull("h/0", tmp_path / "out")
    assert registry.publish(tmp_path / "out/hypernetwork.safetensors", "h/0", base="demo/base").version == 1


@pytest.mark.parametrize(
    ("numbered", "metadata", "activations", "normed"),
    [
        ([(0, (16, 8)), (1, (8, 16))], {}, ["linear", "linear"], False),
        ([(0, (16, 8)), (1, (8, 16))], {"activation_func": "None"}, ["linear", "linear"], False),
        ([(0, (16, 8)), (2, (8, 16))], {"activation_func": "Swish"}, ["swish", "swish"], False),
        ([(0, (16, 8)), (3, (8, 16))], {**RELU, "use_dropout": "True"}, ["relu", "relu"], False),
        ([(0, (16, 8)), (2, (8, 16))], {**RELU, "activate_output": "False"}, ["relu", "linear"], False),
        (
            [(0, (16, 8)), (2, (16,)), (4, (8, 16)), (6, (8,))],
            {**RELU, "is_layer_norm": "True", "dropout_structure": "[0, 0.3, 0]"},
            ["relu", "relu"],
            True,
        ),
        (
            [(0, (16, 8)), (2, (16,)), (3, (8, 16)), (4, (8,))],
            {**RELU, "is_layer_norm": "true", "activate_output": "0"},
            ["relu", "linear"],
            True,
        ),
        ([(0, (8, 8))], {"layer_structure": "[1, 1]"}, ["linear"], False),
        ([(0, (12, 8)), (1, (8, 12))], {"layer_structure": "[1, 1.5, 1]"}, ["linear", "linear"], False),
    ],
)
def test_numbers_and_header_say_what_stands_where(
    numbered: list[tuple[int, tuple[int, ...]]],
    metadata: dict[str, str],
    activations: list[str],
    normed: bool,
    registry: Registry,
    tmp_path: Path,
) -> None:
    published(registry, save(tmp_path / "a.safetensors", layers(8, *numbered), metadata))
    record = read_record(registry.record_path(registry.resolve("h/0")))
    assert isinstance(record, dict)
    for side in (record[8].k, record[8].v):
        assert [layer.activation for layer in side] == activations
        assert [layer.norm is not None for layer in side] == [normed] * len(side)


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (320, None)])
def test_the_width_of_the_text_says_the_family(
    width: int, family: str | None, registry: Registry, tmp_path: Path
) -> None:
    tensors = layers(width, (0, (width, width)))
    file = save(tmp_path / "a.safetensors", tensors, {"layer_structure": "[1, 1]"})
    assert published(registry, file).family == family


def test_a_width_that_the_base_lacks_does_not_fit(registry: Registry, base: Path, tmp_path: Path) -> None:
    registry.publish(base, "demo/base")
    file = save(tmp_path / "a.safetensors", plain(WIDTH) | plain(9) | plain(SELF), RELU)
    with pytest.raises(Incompatible, match="contexts of width 9, but attention in this sd1 base reads text") as caught:
        registry.publish(file, "h/a", base="demo/base")
    assert caught.value.fields == {"adapter_widths": (9,), "base_widths": (8, 4)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        (
            plain(8),
            {},
            r"8\.k\.linear\.2 has another number than 1, which",
        ),  # an activation that the header does not name
        (plain(8, second=3), RELU, "has another number than 2, which"),
        (plain(8, second=4), {**RELU, "use_dropout": "1"}, r"8\.k\.linear\.4 has another number than 2 or 3, which"),
        (plain(8, second=1), RELU, "has another number than 2, which"),
        (layers(8, (1, (16, 8)), (3, (8, 16))), RELU, "has another number than 0"),
        (plain(8), {**RELU, "is_layer_norm": "True"}, "2 layers with weights, but layer_structure"),
        (plain(8), {**RELU, "layer_structure": "[1, 3, 1]"}, "has shape"),
        (plain(8), {**RELU, "layer_structure": "[1, 2, 2]"}, "first and last number must be 1"),
        (plain(8), {**RELU, "layer_structure": "[2, 1]"}, "first and last number must be 1"),
        (plain(8), {**RELU, "layer_structure": "[1]"}, "2 to 32 numbers"),
        (plain(8), {**RELU, "layer_structure": "[1, 1e999, 1]"}, "at most 64"),
        (plain(8), {**RELU, "layer_structure": "[1, -2, 1]"}, "more than 0"),
        (plain(8), {**RELU, "layer_structure": "1, 2, 1"}, "a list of numbers"),
        (plain(8), {**RELU, "layer_structure": '[1, "2", 1]'}, "a list of numbers"),
        (plain(8), {"activation_func": "softmax"}, "activation_func is 'softmax'; known are"),
        (plain(8), {"activation_func": "__import__"}, "known are"),
        (plain(8), {**RELU, "activate_output": "maybe"}, "True or False"),
        (layers(8, (0, (16, 8)), (2, (8, 16)), sides="v"), RELU, r"has 8\.v, but no 8\.k"),
        (plain(8) | {"8.k.linear.0.bias": np.zeros(3, np.float32)}, RELU, "has shape"),
        (plain(8) | {"8.k.linear.0.weight": np.full((16, 8), np.nan, np.float32)}, RELU, "NaN"),
        (plain(8) | {"8.k.linear.0.weight": np.ones((16, 8), np.int64)}, RELU, "I64"),
        (plain(8) | {"more": np.zeros(3, np.float32)}, RELU, "1 keys are not understood: more"),
        ({"8.k.linear.0.weight": np.zeros((8, 8), np.float32)}, {}, "no 8.v"),
        (
            {name: values for name, values in plain(8).items() if name != "8.v.linear.2.bias"},
            RELU,
            r"8\.v\.linear\.2\.bias is missing",
        ),
    ],
)
def test_what_is_no_sound_hypernetwork_is_refused(
    tensors: dict[str, Array], metadata: dict[str, str], says: str, registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=says):
        registry.publish(save(tmp_path / "x.safetensors", tensors, metadata), "h/x")
    assert registry.names() == ()


def test_what_is_derived_of_a_predictor(registry: Registry, base: Path, tmp_path: Path) -> None:
    registry.publish(base, "demo/base")
    digest = "sha256:" + "a" * 64
    found = published(registry, save_predictor(tmp_path / "a.safetensors", config(encoder=digest)), base="demo/base")
    network = found.network
    assert isinstance(network, WeightPredictor)
    assert (found.family, network.condition, network.condition_width, network.encoder) == ("sd1", "image", 5, digest)
    assert network.lora.requires == {TO_K: (4, 8), TO_Q: (4, 4)}
    assert network.lora.ranks == {TO_K: 2, TO_Q: 2}
    path = registry.record_path(registry.resolve("h/0"))
    record = read_record(path)
    assert isinstance(record, PredictorRecord)
    assert predictor.write_record(record) == path.read_bytes()
    assert published(registry, path).network == network.model_copy(
        update={"lora": network.lora.model_copy(update={"family": None})}
    ), "a record can be published"


@pytest.mark.parametrize(
    ("changes", "tensors", "says"),
    [
        ({"heads": 3}, {}, "not a multiple of heads"),
        ({"condition": "sound"}, {}, "condition: Input should be 'image' or 'text'"),
        ({"alpha": float("inf")}, {}, "alpha"),
        ({"alpha": 0.0}, {}, "alpha / rank"),
        ({"passes": 0}, {}, "passes"),
        ({"encoder": "sha256:1"}, {}, "encoder"),
        ({"more": 1}, {}, "more: Extra inputs"),
        ({"targets": [TO_K, TO_K]}, {}, "named twice"),
        ({"depth": 2}, {}, r"decoder\.layers\.1\..* is missing"),
        ({"a": 4}, {}, "has shape"),
        ({}, {"queries": np.zeros((3, 4), np.float32)}, r"queries has shape \(3, 4\).*it is \(2, 4\)"),
        ({}, {"head.bias": np.full(10, np.inf, np.float32)}, "NaN or infinite"),
        ({}, {"more": np.zeros(1, np.float32)}, "1 keys are not understood: more"),
    ],
)
def test_what_is_no_sound_predictor_is_refused(
    changes: dict[str, Any], tensors: dict[str, Array], says: str, registry: Registry, tmp_path: Path
) -> None:
    text = json.dumps(config(**changes))
    file = save(tmp_path / "x.safetensors", predictor_tensors(config()) | tensors, {predictor.CONFIG: text})
    with pytest.raises(Refused, match=says):
        registry.publish(file, "h/x")


def test_a_predictor_of_another_base_does_not_fit(registry: Registry, base: Path, tmp_path: Path) -> None:
    registry.publish(base, "demo/base")
    elsewhere = config(targets=["unet.mid_block.attentions.1.proj_in"])
    with pytest.raises(Incompatible, match="mid_block"):
        registry.publish(save_predictor(tmp_path / "a.safetensors", elsewhere), "h/a", base="demo/base")
    text = config(condition="text")
    with pytest.raises(Incompatible, match="text of width 5, but the text encoder of this sd1 base gives 8"):
        registry.publish(save_predictor(tmp_path / "b.safetensors", text), "h/a", base="demo/base")
    registry.publish(save_predictor(tmp_path / "c.safetensors", text, condition=WIDTH), "h/a", base="demo/base")


@pytest.mark.parametrize("metadata", [{}, {"format": context.FORMAT}, {"format": "scumble.lora.1"}])
def test_a_file_that_is_no_record_is_an_integrity_error(metadata: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="not a hypernetwork's record"):
        read_record(save(tmp_path / "a.safetensors", plain(8), metadata))


def test_a_damaged_pickle_is_refused_with_what_would_be_right(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "ink.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(Refused, match=r"as if it were cut off; fetch it again.*Use a safetensors file"):
        registry.publish(tmp_path / "ink.pt", "h/x")


@pytest.mark.parametrize(("activation", "norm"), [(each, i % 2 == 0) for i, each in enumerate(sorted(ACTIVATIONS))])
def test_the_webuis_own_file_has_the_record_of_its_safetensors(
    registry: Registry, tmp_path: Path, activation: str, norm: bool
) -> None:
    how: dict[str, Any] = {"activation": activation, "norm": norm, "structure": (1, 1.5, 1), "dropout": (0, 0.3, 0)}
    theirs = tiny_hypernetwork.WebuiHypernetwork([WIDTH], seed=1, **how)
    plain = registry.publish(theirs.save(tmp_path / "a.safetensors"), "h/plain")
    pickled = registry.publish(tiny_hypernetwork.save_webui(theirs, tmp_path / "a.pt"), "h/pickled")
    assert pickled.manifest.record == plain.manifest.record
    assert pickled.manifest.compatibility == plain.manifest.compatibility
    registry.pull("h/pickled", tmp_path / "pulled")
    again = registry.publish(tmp_path / "pulled/hypernetwork.safetensors", "h/pickled")
    assert again.manifest.record == pickled.manifest.record


def test_keys_beside_a_hypernetwork_may_be_left_out(registry: Registry, tmp_path: Path) -> None:
    file = save(tmp_path / "a.safetensors", plain(WIDTH) | {"more": np.ones(2, np.float32)}, RELU)
    with pytest.raises(Refused, match="not understood: more"):
        registry.publish(file, "h/a")
    assert registry.publish(file, "h/a", allow_leftover=True).manifest.leftover == ("more",)
