"""What every Executor keeps to. A new executor is one more entry of `support.executors`.

torch is the oracle: it is held to diffusers itself (`tests/unit/server/test_equals_diffusers.py`). TensorRT's engines
run in the stand-in of `support.fake_tensorrt`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scumble.errors import Refused
from scumble_build.export.denoiser import feature_places, residual_places
from scumble_build.graphs.adapted import Factors
from scumble_build.graphs.hypernetwork import Hypernetwork
from scumble_build.graphs.inputs import ContextInputs, ImageInputs, NetInputs, StepInputs, level_sizes
from scumble_build.graphs.layout import Layout
from scumble_build.graphs.text import Overrides, TextInputs
from scumble_registry import Registry, Version
from scumble_registry.formats.hypernetwork.context_record import Layer, Sides
from scumble_server.executors.protocol import Executor, NetModel
from support.control_nets import load_unet, make_net, make_union
from support.executors import EXECUTORS, EXPORTED, Opened, open_executor
from support.paging import some_factors
from support.places import DEMO_BASE
from support.tiny_families import make_tiny_sdxl, make_vae
from support.tiny_variant import make_checkpoint

TOLERANCE = 5e-6
"""Of the largest value, or of 1."""
WIDE_TOLERANCE = 1e-4
"""Where sums have many terms: 64 columns of factors, or layers of a real width."""
HALF_TOLERANCE = 2e-2
"""Of the largest value: half precision, rounded at other places."""


@pytest.fixture(scope="session")
def sd1(tiny_base: Path, graph_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Opened]:
    """The executor of this name over the tiny base, opened once."""
    opened: dict[str, Opened] = {}

    def of(name: str) -> Opened:
        if name not in opened:
            opened[name] = open_executor(name, tiny_base, tmp_path_factory.mktemp(name), graph_cache)
        return opened[name]

    return of


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(params=EXECUTORS)
def every(request: pytest.FixtureRequest, sd1: Callable[[str], Opened]) -> Opened:
    return sd1(request.param)


@pytest.fixture(params=EXPORTED)
def exported(request: pytest.FixtureRequest, sd1: Callable[[str], Opened]) -> Opened:
    return sd1(request.param)


@pytest.fixture(scope="session")
def tuned(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Version, dict[str, Any]]:
    """A checkpoint of the base whose text encoder is another, and its weights."""
    folder = tmp_path_factory.mktemp("tuned")
    make_checkpoint(tiny_base, folder / "files", seed=3, components=("text_encoder",))
    with Registry.open(folder / "home", create=True) as registry:
        registry.publish(tiny_base, "tiny/base")
        version = registry.publish(folder / "files", "d/tuned", base="tiny/base")
    (file,) = (folder / "files/text_encoder").glob("*.safetensors")
    return version, {"text_encoder": load_file(file)}


def check_near(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max().clamp(min=1)) <= tolerance


def kv_width(executor: Executor) -> int:
    return sum(2 * place.width for place in executor.kv_slices)


def factors(layout: Layout, rows: int, rank: int, *, sets: int, full: bool = False, stretch: bool = False) -> Factors:
    chosen = [row % sets for row in range(rows)]
    return some_factors(layout, chosen, rank, full=full, size=0.2, stretch=0.3 if stretch else 0.0)


def some_images(opened: Opened, rows: Tensor, size: tuple[int, int], *, groups: int) -> ImageInputs:
    places = level_sizes(*size, opened.oracle.graphs.denoiser.levels)
    positions = sum(height * width for height, width in places)
    tokens = torch.rand(len(rows), groups, 5) > 0.3
    tokens[:, :, 0] = True
    kv = torch.randn(len(rows), groups, 5, kv_width(opened.executor))
    return ImageInputs(rows, kv, tokens, torch.rand(len(rows), groups), torch.rand(len(rows), groups, positions))


def some_maps(places: list[tuple[int, int]], rows: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
    sides = level_sizes(*size, 1 + max(level for _, level in places))
    return tuple(0.3 * torch.randn(rows, channels, *sides[level]) for channels, level in places)


def step_inputs(opened: Opened, rows: int, size: tuple[int, int], kind: str, tokens: int = 77) -> StepInputs:
    """What the rows of a batch may carry, of one kind."""
    layout, denoiser = opened.executor.step_layout, opened.oracle.graphs.denoiser
    some = max(1, rows - 1)  # the others carry nothing
    sized = {}
    if denoiser.unet.config.addition_embed_type:  # type: ignore[union-attr]
        sized = {"pooled": torch.randn(rows, 40), "sizes": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * rows)}
    changes: dict[str, Any] = {
        "bare": {},
        "mask": {"kv_mask": torch.arange(tokens) < torch.randint(1, tokens, (rows, 1))},
        "small": {"factors": factors(layout, some, 8, sets=2)},
        "wide": {"factors": factors(layout, rows, 64, sets=min(rows, 3))},
        "full": {"factors": factors(layout, some, 16, sets=2, full=True)},
        "dora": {"factors": factors(layout, some, 8, sets=1, full=True, stretch=True)},
        "images": {"images": some_images(opened, torch.arange(rows)[-some:], size, groups=2)},
        "residuals": {"residuals": some_maps(residual_places(denoiser), rows, size)},
        "features": {"features": some_maps(feature_places(denoiser), rows, size)},
    }
    changes["everything"] = {
        name: value
        for each in ("mask", "dora", "images", "residuals", "features")
        for name, value in changes[each].items()
    }
    return StepInputs(torch.randn(rows, tokens, kv_width(opened.executor)), **sized, **changes[kind])


def check_step(opened: Opened, inputs: StepInputs, size: tuple[int, int], tolerance: float = TOLERANCE) -> None:
    rows = len(inputs.kv)
    sample, timestep = torch.randn(rows, 4, *size), torch.randint(0, 999, (rows,)).float()
    found = opened.executor.denoise(sample, timestep, inputs)
    assert found.dtype == torch.float32
    check_near(found, opened.oracle.denoise(sample, timestep, inputs), tolerance)


KINDS = ("bare", "mask", "small", "wide", "images", "residuals", "features", "dora", "everything")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_kind_equals_torch(exported: Opened, kind: str) -> None:
    torch.manual_seed(3)
    tolerance = WIDE_TOLERANCE if kind == "wide" else TOLERANCE
    for rows, size in ((1, (8, 8)), (3, (9, 6)), (6, (8, 12))):
        check_step(exported, step_inputs(exported, rows, size, kind), size, tolerance)


@pytest.mark.parametrize(
    ("kind", "precision", "tolerance"),
    [("small", "fp32", WIDE_TOLERANCE), ("everything", "fp32", WIDE_TOLERANCE), ("small", "fp16", HALF_TOLERANCE)],
)
def test_a_step_of_the_demo_base_equals_torch(
    graph_cache: Path, tmp_path: Path, kind: str, precision: Any, tolerance: float
) -> None:
    """On ONNX Runtime alone: what a real size adds is rounding, and that is its kernels'."""
    torch.manual_seed(11)
    opened = open_executor("onnxruntime", DEMO_BASE, tmp_path, graph_cache, precision=precision)
    for rows, size in ((1, (16, 16)), (3, (12, 20))):
        check_step(opened, step_inputs(opened, rows, size, kind), size, tolerance)


def test_a_batch_is_stacked_once_and_anew_when_it_changes(exported: Opened) -> None:
    torch.manual_seed(4)
    one, other = (step_inputs(exported, 2, (8, 8), "small") for _ in range(2))
    for inputs in (one, one, other, one):
        check_step(exported, inputs, (8, 8))


@pytest.mark.parametrize("kind", ["bare", "mask", "small", "dora"])
def test_a_row_does_not_see_those_that_join_it(every: Opened, kind: str) -> None:
    torch.manual_seed(13)
    size, rows = (8, 8), 4
    inputs = step_inputs(every, rows, size, kind)
    sample, timestep = torch.randn(rows, 4, *size), torch.tensor([900.0, 500.0, 500.0, 3.0])
    together = every.executor.denoise(sample, timestep, inputs)
    carried = inputs.factors
    for row in range(rows):
        own = None
        if carried is not None and row < carried.rows:
            own = replace(
                carried,
                small=replace(carried.small, table=carried.small.table[row : row + 1]),
                rest=None if carried.rest is None else replace(carried.rest, table=carried.rest.table[row : row + 1]),
                scale=carried.scale[row : row + 1],
                stretch_out=None if carried.stretch_out is None else carried.stretch_out[row : row + 1],
                stretch_in=None if carried.stretch_in is None else carried.stretch_in[row : row + 1],
            )
        mask = None if inputs.kv_mask is None else inputs.kv_mask[row : row + 1]
        alone = StepInputs(inputs.kv[row : row + 1], mask, own)
        found = every.executor.denoise(sample[row : row + 1], timestep[row : row + 1], alone)
        check_near(together[row : row + 1], found)


@pytest.mark.parametrize("skip", [0, 1])
def test_text_equals_torch(exported: Opened, skip: int) -> None:
    torch.manual_seed(5)
    tokens = torch.randint(0, 500, (3, 77))
    mask = torch.ones(3, 77, dtype=torch.int64)
    mask[0, 60:] = 0
    overrides = Overrides(torch.randn(2, 32), torch.tensor([0, 2]), torch.tensor([4, 9]))
    for carried in (None, factors(exported.executor.text_layouts[0], 3, 8, sets=3)):
        inputs = TextInputs(tokens, carried, overrides, skip, mask)
        check_near(exported.executor.encode(0, inputs).states, exported.oracle.encode(0, inputs).states)


def test_a_text_does_not_see_those_beside_it(every: Opened) -> None:
    torch.manual_seed(14)
    tokens = torch.randint(0, 500, (3, 77))
    overrides = Overrides(torch.randn(1, 32), torch.tensor([1]), torch.tensor([4]))
    together = every.executor.encode(0, TextInputs(tokens, None, overrides, 0)).states
    for row in (0, 2):
        alone = every.executor.encode(0, TextInputs(tokens[row : row + 1])).states
        check_near(together[row : row + 1], alone)
    assert not torch.allclose(together[1], every.executor.encode(0, TextInputs(tokens[1:2])).states[0], atol=1e-3)


def test_keys_and_values_equal_torch(exported: Opened) -> None:
    torch.manual_seed(6)
    states, of_values = torch.randn(2, 77, 32), torch.randn(2, 77, 32)
    carried = factors(exported.executor.kv_layout, 2, 16, sets=1)
    for given in ((states, None, None), (states, carried, of_values)):
        check_near(exported.executor.project(*given), exported.oracle.project(*given))


@pytest.mark.parametrize("tiled", [False, True])
def test_the_vae_equals_torch(exported: Opened, *, tiled: bool) -> None:
    torch.manual_seed(7)
    latents, pixels = torch.randn(2, 4, 12, 9), torch.rand(1, 3, 64, 48) * 2 - 1
    found, expected = (each.vae.decode(latents, tiled=tiled) for each in (exported.executor, exported.oracle))
    assert found.dtype == torch.uint8
    assert (found.int() - expected.int()).abs().max() <= 1
    ours, theirs = (each.vae.encode(pixels) for each in (exported.executor, exported.oracle))
    check_near(ours.mean, theirs.mean)
    check_near(ours.deviation, theirs.deviation)


def test_another_vae_is_read_and_the_bases_stays(every: Opened, tmp_path: Path) -> None:
    make_vae(seed=5).save_pretrained(tmp_path)
    torch.manual_seed(15)
    latents = torch.randn(1, 4, 8, 8)
    before = every.executor.vae.decode(latents)
    found, expected = (each.load_vae(tmp_path).decode(latents) for each in (every.executor, every.oracle))
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found.int() - before.int()).abs().max() > 1
    assert torch.equal(every.executor.vae.decode(latents), before)


def check_net(ours: Opened, version: Version, base: Path, make: Callable[..., NetModel]) -> None:
    width = load_unet(base).config.cross_attention_dim
    kinds, pictures = ((1, 3), 2) if make is make_union else ((), 1)
    loaded = ours.load_net(version, lambda: make(load_unet(base), 5))
    assert loaded.of(kinds) is loaded.of(kinds)
    mine = loaded.of(kinds)
    theirs = ours.oracle.load_net(version, lambda: make(load_unet(base), 5)).of(kinds)
    assert mine.kv_width == theirs.kv_width
    for rows, (height, wide) in ((1, (8, 8)), (3, (9, 6))):
        states = torch.randn(rows, 80, width)
        controls, weights = torch.rand(pictures, 3, 8 * height, 8 * wide), [0.7] * pictures
        kv, hint = mine.project(states), mine.embed(controls, weights)
        check_near(kv, theirs.project(states))
        check_near(hint, theirs.embed(controls, weights))
        pooled, sizes = torch.randn(rows, 40), torch.full((rows, 6), 1024.0)
        added, expected = mine.condition(pooled, sizes), theirs.condition(pooled, sizes)
        assert (added is None) == (expected is None)
        if added is not None and expected is not None:
            check_near(added, expected)
        sample, timestep = torch.randn(rows, 4, height, wide), torch.randint(0, 999, (rows,)).float()
        mask = torch.arange(80) < torch.randint(1, 80, (rows, 1))
        for there in (None, mask):
            inputs = sample, timestep, NetInputs(kv, hint.expand(rows, -1, -1, -1), added, there)
            for one, other in zip(mine.residuals(*inputs), theirs.residuals(*inputs), strict=True):
                check_near(one, other)
    loaded.close()


@pytest.mark.parametrize("make", [make_net, make_union])
def test_a_controlnet_equals_torch(
    exported: Opened, tuned: tuple[Version, Any], tiny_base: Path, make: Callable[..., NetModel]
) -> None:
    torch.manual_seed(12)
    check_net(exported, tuned[0], tiny_base, make)


@pytest.fixture(scope="module", params=EXPORTED)
def sdxl(
    request: pytest.FixtureRequest, sdxl_folder: Path, graph_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Opened:
    scratch = tmp_path_factory.mktemp("sdxl")
    return open_executor(request.param, sdxl_folder, scratch, graph_cache, family="sdxl", denoiser="unet.bare")


def test_sdxl_reads_pooled_text_and_sizes(sdxl: Opened) -> None:
    torch.manual_seed(9)
    for size in ((8, 8), (6, 10)):
        check_step(sdxl, step_inputs(sdxl, 3, size, "mask", tokens=154), size)
    tokens = torch.randint(1, 500, (2, 77))
    expected, found = (each.encode(1, TextInputs(tokens)) for each in (sdxl.oracle, sdxl.executor))
    assert found.pooled is not None and expected.pooled is not None
    check_near(found.pooled, expected.pooled)


@pytest.mark.parametrize("make", [make_net, make_union])
def test_a_controlnet_of_sdxl_equals_torch(
    sdxl: Opened, tuned: tuple[Version, Any], sdxl_folder: Path, make: Callable[..., NetModel]
) -> None:
    torch.manual_seed(12)
    check_net(sdxl, tuned[0], sdxl_folder, make)


def test_a_variant_shares_what_it_does_not_change_and_the_base_stays(
    every: Opened, tuned: tuple[Version, dict[str, Any]]
) -> None:
    torch.manual_seed(8)
    base, (version, changed) = every.executor, tuned
    tokens = TextInputs(torch.randint(0, 500, (1, 77)))
    digest, before = base.weights_digest(), base.encode(0, tokens).states
    variant, oracle = every.variant(changed, version)
    check_near(variant.encode(0, tokens).states, oracle.encode(0, tokens).states)
    assert (variant.encode(0, tokens).states - before).abs().max() > 1e-2
    assert torch.equal(base.encode(0, tokens).states, before)
    assert base.weights_digest() == digest == every.oracle.weights_digest()
    assert variant.weights_digest() == oracle.weights_digest() != digest
    for name in ("unet.conv_in.weight", "unet.mid_block.resnets.0.norm1.bias"):
        assert variant.parameter(name).data_ptr() == base.parameter(name).data_ptr()
    variant.close()
    variant.close()
    assert torch.equal(base.encode(0, tokens).states, before), "what it shared outlives it"


def test_a_variant_with_a_tensor_of_no_place_is_refused(every: Opened, tuned: tuple[Version, Any]) -> None:
    version, changed = tuned
    every.engines[version.digest] = every.engines.get("", {})
    odd = {"text_encoder": {**changed["text_encoder"], "nowhere.weight": torch.ones(1)}}
    with pytest.raises(
        Refused, match=r"the base has no tensor for the checkpoint's text_encoder\.nowhere\.weight; save it again"
    ):
        every.executor.variant(odd, of=version)


def test_weights_are_those_of_the_files(every: Opened, tiny_base: Path) -> None:
    executor = every.executor
    (file,) = (tiny_base / "unet").glob("*.safetensors")
    for name, values in load_file(file).items():
        assert torch.equal(executor.parameter(f"unet.{name}"), values)
    name = "unet.down_blocks.0.resnets.0.conv1"
    assert executor.weight(name).data_ptr() == executor.parameter(f"{name}.weight").data_ptr()
    both = ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder.encoder.layers.0.mlp.fc1")
    assert len({executor.weight(spelling).data_ptr() for spelling in both}) == 1
    assert not executor.weight(name).requires_grad
    with pytest.raises(Refused, match=r"the base has no unet\.nowhere\.weight"):
        executor.weight("unet.nowhere")


def test_it_says_truly_whether_it_serves_what_changes_the_graph(every: Opened) -> None:
    torch.manual_seed(16)
    width = every.oracle.graphs.denoiser.unet.config.block_out_channels[0]  # type: ignore[union-attr]
    layers = (Layer(np.ones((width, width), np.float32), np.ones(width, np.float32), None, "linear"),)
    net = Hypernetwork({width: Sides(layers, layers)})
    inputs = StepInputs(torch.randn(1, 77, kv_width(every.executor)))
    changed = replace(inputs, contexts=(ContextInputs(torch.tensor([0]), (net,), torch.ones(1, 1)),))
    arguments = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    if every.executor.changes_graphs:
        difference = every.executor.denoise(*arguments, changed) - every.executor.denoise(*arguments, inputs)
        assert difference.abs().max() > 1e-3
    else:
        with pytest.raises(Refused, match="--executor torch"):
            every.executor.denoise(*arguments, changed)


ASKED = ("height", "width", "tokens", "rank_pages", "groups", "image_tokens")
"""The axes whose sizes follow from one request; how many rows step together is the batch's."""


def test_sizes_out_of_limits_are_refused_by_name(every: Opened) -> None:
    includes = frozenset(("factors", "images"))
    for limits in every.executor.limits:
        for axes in limits.profiles:
            assert {"height", "width", "tokens"} <= axes.keys()
            asked = {name: axes[name] for name in ASKED if name in axes}
            every.executor.prepare(includes, {name: sizes.stop - 1 for name, sizes in asked.items()})
            for name, sizes in asked.items():
                with pytest.raises(Refused, match=f" {sizes.stop} is not within {sizes.start} to {sizes.stop - 1}"):
                    every.executor.prepare(includes, {name: sizes.stop})
    if not every.executor.limits:
        every.executor.prepare(includes, {"height": 9999, "width": 9999, "tokens": 9999})


def test_the_receipt_names_executor_device_and_precision(
    sd1: Callable[[str], Opened],
) -> None:
    for name in EXECUTORS:
        executor = sd1(name).executor
        told = executor.describe()
        assert (told["executor"], told["precision"]) == (name, "fp32")
        assert told["device"] == executor.device == "cpu"
        assert executor.dtype == torch.float32
        assert executor.copies >= 1
        assert executor.max_rows >= 2
