"""Strangers in one batch: whatever each row carries, it is denoised as it would be alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from scumble_build.graphs.denoiser import Denoiser, KVProjection
from scumble_build.graphs.hypernetwork import Hypernetwork
from scumble_build.graphs.inputs import NetInputs, StepInputs, level_sizes
from scumble_build.graphs.layout import PAGE, Extent
from scumble_registry.formats.hypernetwork.context_record import Layer, Sides
from scumble_server.denoise.phase import Phase
from scumble_server.denoise.stacking import stack
from scumble_server.factors.bound_set import BoundSet, move_to_pools
from scumble_server.factors.rows import RowFactors
from scumble_server.memory.pages import PageSet, Pool
from scumble_server.methods.controlnet.part import ControlPart
from scumble_server.methods.controlnet.residuals import RowNet
from scumble_server.methods.hypernetwork.context_networks import ContextsPart
from scumble_server.methods.ip_adapter.part import ImagesPart

SIZE = (9, 6)  # levels round up


class Graph:
    """The tiny base's denoiser, with random things to carry."""

    def __init__(self, folder: Path) -> None:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).eval()
        self.projection = KVProjection(unet)
        self.denoiser = Denoiser(unet, self.projection.slices)
        self.channels = unet.config.block_out_channels
        self.generator = torch.Generator().manual_seed(0)
        layout = self.denoiser.layout
        self.pools = [Pool(extent, torch.device("cpu"), torch.float32) for extent in (layout.small, layout.rest)]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def kv(self, rows: int, tokens: int = 77) -> Tensor:
        return self.projection(self.random(rows, tokens, 32))

    def factors(self, rank: int, *, full: bool) -> RowFactors:
        def pages(extent: Extent) -> PageSet:
            sizes = ((rank // PAGE, PAGE * width) for width in (extent.total_in, extent.total_out))
            A, B = (0.05 * self.random(*size) for size in sizes)
            return PageSet.own(A, B)

        layout = self.denoiser.layout
        own = BoundSet(pages(layout.small), pages(layout.rest) if full else None, (rank,))
        return RowFactors(move_to_pools(own, self.pools), self.random(rank))

    def images(self, rows: int, groups: int, tokens: int, *, areas: bool = False) -> ImagesPart:
        places = sum(height * width for height, width in level_sizes(*SIZE, self.denoiser.levels))
        there = torch.ones(groups, tokens, dtype=torch.bool)
        there[0, 1:] = groups == 1  # of several groups, the first has a single token
        kv = self.random(rows, groups, tokens, self.kv(1).shape[-1])
        return ImagesPart(kv, there, self.random(rows, groups), self.random(groups, places).abs() if areas else None)

    def features(self) -> tuple[Tensor, ...]:
        sizes = level_sizes(*SIZE, self.denoiser.levels)
        return tuple(self.random(1, channels, *size) for channels, size in zip(self.channels, sizes, strict=True))

    def contexts(self, *networks: Hypernetwork) -> ContextsPart:
        return ContextsPart(networks, self.random(len(networks)))

    def run(self, phases: list[Phase], sample: Tensor, timestep: Tensor) -> Tensor:
        inputs = stack(phases, "cpu").at(sample, timestep)
        with torch.inference_mode():
            output: Tensor = self.denoiser(sample, timestep, inputs)
        return output


class Zoom:
    """A net whose residuals depend on all that it is given, and which notes how many rows it was asked for."""

    def __init__(self, strength: float, shapes: list[tuple[int, ...]]) -> None:
        self.strength, self.shapes, self.calls = strength, shapes, []

    def residuals(self, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        self.calls.append(len(sample))
        there = torch.ones(inputs.kv.shape[:2]) if inputs.kv_mask is None else inputs.kv_mask
        text = (inputs.kv.mean(2) * there).sum(1) / there.sum(1)
        row = sample.mean((1, 2, 3)) + timestep / 1000 + text + inputs.hint.mean((1, 2, 3))
        ones = (torch.ones(len(sample), *shape) for shape in self.shapes)
        return tuple(one * self.strength * row[:, None, None, None] for one in ones)


def a_phase(kv: Tensor, factors: RowFactors | None = None, **methods: Any) -> Phase:
    """One in which these methods' parts act; of ControlNets, `nets` and `features`."""
    control = {name: methods.pop(name) for name in ("nets", "features") if name in methods}
    parts = {**methods, **({"controlnet": ControlPart(**control)} if control else {})}
    executor: Any = None
    return Phase(executor, kv, factors, parts)


@pytest.fixture(scope="module")
def graph(tiny_base: Path) -> Graph:
    return Graph(tiny_base)


def shapes_of_residuals(graph: Graph) -> list[tuple[int, ...]]:
    """As the tiny UNet's skip connections and its middle block are."""
    (h0, w0), (h1, w1) = level_sizes(*SIZE, 2)
    narrow, wide = graph.channels
    return [(narrow, h0, w0), (narrow, h0, w0), (narrow, h1, w1), (wide, h1, w1), (wide, h1, w1)]


def hypernetwork(widths: tuple[int, ...], seed: int) -> Hypernetwork:
    draw = np.random.default_rng(seed)

    def layers(width: int) -> tuple[Layer, ...]:
        weight, bias = draw.normal(size=(width, width)) * width**-0.5, draw.normal(size=width)
        return (Layer(weight.astype(np.float32), bias.astype(np.float32), None, "tanh"),)

    return Hypernetwork({width: Sides(layers(width), layers(width)) for width in widths})


def test_every_mix_is_denoised_as_alone(graph: Graph) -> None:
    one, two = (Zoom(strength, shapes_of_residuals(graph)) for strength in (0.7, -1.1))
    shared = graph.factors(8, full=False)

    def net(net: Any, rows: int, tokens: int = 77, *, skips_negative: bool = False) -> RowNet:
        scale = graph.random(1, 5).expand(rows, -1).clone()
        scale[: rows - 1] *= not skips_negative
        return RowNet(net, graph.random(rows, tokens, 3), graph.random(1, 2, 3, 3), scale)

    first, second = (hypernetwork(graph.channels, seed) for seed in (1, 2))
    phases = [
        a_phase(graph.kv(2), shared),
        a_phase(graph.kv(2), shared, ip_adapter=graph.images(2, 1, 4)),
        a_phase(graph.kv(1), graph.factors(24, full=True), ip_adapter=graph.images(1, 3, 16, areas=True)),
        a_phase(graph.kv(2), graph.factors(8, full=False), hypernetwork=graph.contexts(first, second)),
        a_phase(graph.kv(2), ip_adapter=graph.images(2, 2, 4), nets=(net(one, 2, skips_negative=True), net(two, 2))),
        a_phase(graph.kv(2, 154), nets=(net(one, 2, 154), net(one, 2, 154)), features=graph.features()),
        a_phase(graph.kv(1), features=graph.features(), hypernetwork=graph.contexts(first)),
        a_phase(graph.kv(2), hypernetwork=graph.contexts(second, first)),
        a_phase(graph.kv(1), hypernetwork=graph.contexts(first)),
        a_phase(graph.kv(2)),
    ]
    counts = [phase.kv.shape[0] for phase in phases]
    rows = sum(counts)
    sample, timestep = graph.random(rows, 4, *SIZE), torch.linspace(900, 10, rows)
    together = graph.run(phases, sample, timestep).split(counts)
    assert (one.calls, two.calls) == ([5], [2]), "once a step, and not for the half of a guess"
    bare = graph.run([a_phase(phase.kv) for phase in phases], sample, timestep).split(counts)
    alone = [
        graph.run([phase], *rows)
        for phase, *rows in zip(phases, sample.split(counts), timestep.split(counts), strict=True)
    ]
    for i in range(len(phases)):
        assert (together[i] - alone[i]).abs().max() <= 1e-5
        assert i == len(phases) - 1 or (together[i] - bare[i]).abs().max() >= 1e-3, "what is carried acts"


def test_texts_of_different_length_do_not_see_each_others_padding(graph: Graph) -> None:
    phases = [a_phase(graph.kv(2, 77)), a_phase(graph.kv(1, 154)), a_phase(graph.kv(2, 8))]
    sample, timestep = graph.random(5, 4, *SIZE), torch.full((5,), 500.0)
    together = graph.run(phases, sample, timestep).split([2, 1, 2])
    for phase, mine, *row in zip(phases, together, sample.split([2, 1, 2]), timestep.split([2, 1, 2]), strict=True):
        assert (graph.run([phase], *row) - mine).abs().max() <= 1e-5


def test_a_group_of_scale_zero_is_the_picture_without_it(graph: Graph) -> None:
    kv, images = graph.kv(2), graph.images(2, 2, 4)
    silent = ImagesPart(images.kv, images.tokens, torch.zeros(2, 2))
    sample, timestep = graph.random(2, 4, *SIZE), torch.full((2,), 500.0)
    with_it = graph.run([a_phase(kv, ip_adapter=silent)], sample, timestep)
    assert torch.equal(with_it, graph.run([a_phase(kv)], sample, timestep))


def test_inputs_are_computed_in_the_executors_type(graph: Graph) -> None:
    phase = a_phase(graph.kv(1), graph.factors(24, full=False), ip_adapter=graph.images(1, 2, 4, areas=True))
    inputs = stack([phase], "cpu").inputs.to(torch.device("cpu"), torch.bfloat16)
    assert isinstance(inputs, StepInputs)
    assert inputs.images is not None
    assert inputs.factors is not None
    assert inputs.images.areas is not None
    assert inputs.images.tokens is not None
    assert inputs.images.tokens.dtype is torch.bool
    assert inputs.images.rows.dtype is torch.int64
    floats = (inputs.kv, inputs.images.kv, inputs.images.scale, inputs.images.areas, inputs.factors.small.A)
    assert {tensor.dtype for tensor in floats} == {torch.bfloat16}
