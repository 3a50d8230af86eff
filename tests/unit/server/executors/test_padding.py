"""Padded steps: equal to unpadded ones, few, and never another request's."""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from scumble_build.graphs.adapted import Factors
from scumble_build.graphs.inputs import ContextInputs, ImageInputs, LiteInputs, StepInputs
from scumble_build.graphs.layout import PAGE
from scumble_build.graphs.lllite import LLLite
from scumble_registry import Registry
from scumble_server.executors.device import Buffers, Captured, Graphs, Stepping
from scumble_server.executors.padding import PAGES, ROWS, TEXT, Padding, Step, bucket
from scumble_server.executors.torch.executor import TorchExecutor, _computing
from support.every_kind import EveryKind, publish_every_kind, random_request
from support.paging import some_factors
from support.tiny_families import make_tiny_sdxl
from support.traffic import Mix, Traffic

if TYPE_CHECKING:
    from support.running import Running

CPU = torch.device("cpu")
TOLERANCE = 1e-3


@dataclass
class Taping:
    """A capture that captures nothing, and counts its replays."""

    replays: int = 0

    def __call__(self, work: Callable[[], Any]) -> Callable[[], Any]:
        def replay() -> Any:
            self.replays += 1
            return work()

        return replay


def capturing(executor: TorchExecutor, *, graphs: bool = True) -> Stepping:
    """Make the executor run as on CUDA, with graphs or without."""
    stepping = Stepping(Buffers(CPU), Graphs(Taping() if graphs else None))
    executor._captured = Captured(stepping, _computing(executor.graphs.denoiser))
    return stepping


@dataclass
class Watched:
    """Passes steps on to a padding, and counts rows."""

    padding: Padding = field(default_factory=Padding)
    rows: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, step: Step) -> Step:
        padded = self.padding(step)
        self.rows.append((len(step.sample), len(padded.sample)))
        return padded


@dataclass
class Pair:
    """A service that pads and one that does not, over the same registry."""

    every: EveryKind
    plain: Running
    padded: Running
    watched: Watched


def pair(base: Path, folders: pytest.TempPathFactory, start: Callable[..., Running]) -> Iterator[Pair]:
    home = folders.mktemp("padded")
    with Registry.open(home, create=True) as registry:
        every = publish_every_kind(registry, base, folders.mktemp("kinds"))
    plain, padded = (
        start(home, every.base, every.files, executor="torch", max_batch_images=16) for _ in ("plain", "padded")
    )
    executor, watched = padded.executor, Watched()
    assert isinstance(executor, TorchExecutor)
    capturing(executor)
    executor._padding = watched  # type: ignore[assignment]
    yield Pair(every, plain, padded, watched)
    plain.service.close()
    padded.service.close()


@pytest.fixture(scope="module")
def of_sd1(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Running]) -> Iterator[Pair]:
    yield from pair(tiny_base, tmp_path_factory, start)


@pytest.fixture(scope="module")
def of_sdxl(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Running]) -> Iterator[Pair]:
    yield from pair(make_tiny_sdxl(tmp_path_factory.mktemp("xl") / "base"), tmp_path_factory, start)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_mixed_batches_of_every_kind_are_drawn_alike_padded_and_unpadded(of_sd1: Pair, seed: int) -> None:
    check_alike(of_sd1, seed)


def test_so_are_those_of_sdxl(of_sdxl: Pair) -> None:
    check_alike(of_sdxl, 0)


def check_alike(pair: Pair, seed: int) -> None:
    rng = random.Random(seed)
    requests = [random_request(pair.every, rng) for _ in range(10)]
    pair.watched.rows.clear()
    together = [result.latents for result in pair.padded.run(requests)]
    assert pair.padded.service.stats().failed_steps == 0
    assert any(given < made for given, made in pair.watched.rows)
    for request, latents in zip(requests, together, strict=True):
        (alone,) = pair.plain.run([request])
        assert (latents - alone.latents).abs().max() <= TOLERANCE


def test_a_device_without_graphs_pads_nothing(of_sd1: Pair) -> None:
    executor = of_sd1.plain.executor
    assert isinstance(executor, TorchExecutor) and executor._captured is None
    given = step_of(executor, 3)
    watched = Watched()
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(executor, "_padding", watched)
        expected = executor.denoise(given.sample, given.timestep, given.inputs)
        patches.setattr(executor, "_captured", None)
        capturing(executor, graphs=False)
        assert torch.equal(executor.denoise(given.sample, given.timestep, given.inputs), expected)
        assert not watched.rows
        capturing(executor)
        assert torch.allclose(executor.denoise(given.sample, given.timestep, given.inputs), expected, atol=1e-5)
        assert watched.rows == [(3, 4)]


def step_of(executor: TorchExecutor, rows: int, **inputs: Any) -> Step:
    width = sum(2 * part.width for part in executor.kv_slices)
    return Step(torch.randn(rows, 4, 8, 8), torch.rand(rows), StepInputs(torch.randn(rows, TEXT, width), **inputs))


def compute(executor: TorchExecutor, step: Step) -> Tensor:
    with torch.inference_mode():
        return _computing(executor.graphs.denoiser)(step)


SETS = {
    "one for all": ([0, 0, 0], 3),
    "one for some": ([0, 0], 2),
    "one each": ([0, 1, 2], 1),
    "of two sizes": ([0, 0, 1], 0),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("full", [False, True])
def test_padded_factors_compute_the_same(of_sd1: Pair, name: str, *, full: bool) -> None:
    executor, (sets, group) = of_sd1.plain.executor, SETS[name]
    assert isinstance(executor, TorchExecutor)
    torch.manual_seed(0)
    factors = some_factors(executor.step_layout, sets, 24, full=full, size=0.05, rows_per_set=group, stretch=0.1)
    step = step_of(executor, 3, factors=factors)
    padded = Padding()(step)
    assert torch.allclose(compute(executor, padded)[:3], compute(executor, step), atol=1e-4)
    assert not torch.allclose(compute(executor, step), compute(executor, step_of_same(step)), atol=1e-2)
    assert padded.inputs.factors is not None
    assert padded.inputs.factors.rows_per_set == (4 if name == "one for all" else 0)


def step_of_same(step: Step) -> Step:
    """The step without its factors."""
    return replace(step, inputs=replace(step.inputs, factors=None))


def test_an_overflow_in_anothers_factors_reaches_no_row_without(of_sd1: Pair) -> None:
    executor = of_sd1.plain.executor
    assert isinstance(executor, TorchExecutor)
    torch.manual_seed(0)
    factors = some_factors(executor.step_layout, [0, 0], 8, rows_per_set=2)
    pages = replace(factors.small, table=factors.small.table + 1)
    pages = replace(
        pages,
        A=torch.cat([torch.zeros(1, pages.A.shape[1]), pages.A * float("inf")]),
        B=torch.cat([torch.zeros(1, pages.B.shape[1]), pages.B]),
    )
    step = step_of(executor, 3, factors=Factors(pages, None, factors.scale, 2))
    padded = compute(executor, Padding()(step))
    assert not padded[:2].isfinite().all()
    assert torch.allclose(padded[2], compute(executor, step_of_same(step))[2], atol=1e-5)


def test_padded_pictures_compute_the_same(of_sd1: Pair) -> None:
    executor = of_sd1.plain.executor
    assert isinstance(executor, TorchExecutor)
    torch.manual_seed(0)
    width, positions = sum(2 * part.width for part in executor.kv_slices), 8 * 8 + 4 * 4
    tokens = torch.rand(2, 3, 5) > 0.5
    tokens[:, :, 0] = True
    for mask, areas in (
        (None, None),
        (tokens, None),
        (None, torch.rand(2, 3, positions)),
        (tokens, torch.rand(2, 3, positions)),
    ):
        images = ImageInputs(torch.tensor([0, 2]), torch.randn(2, 3, 5, width), mask, torch.rand(2, 3), areas)
        step = step_of(executor, 3, images=images)
        padded = Padding()(step)
        assert padded.inputs.images is not None and padded.inputs.images.tokens is not None
        assert padded.inputs.images.tokens.any(-1).all(), "a softmax over nothing is NaN on some devices"
        assert torch.allclose(compute(executor, padded)[:3], compute(executor, step), atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_long_prompts_are_masked_and_every_row_reads_something(*, masked: bool) -> None:
    mask = torch.arange(2 * TEXT) < torch.tensor([[5], [2 * TEXT], [TEXT]]) if masked else None
    step = Step(torch.zeros(3, 1), torch.zeros(3), StepInputs(torch.randn(3, 2 * TEXT, 2), mask))
    padded = Padding()(step).inputs
    assert padded.kv.shape == (4, 3 * TEXT, 2)
    assert padded.kv_mask is not None
    assert padded.kv_mask[:3].sum(-1).tolist() == ([5, 2 * TEXT, TEXT] if masked else [2 * TEXT] * 3)
    assert padded.kv_mask.any(-1).all()


def test_the_rows_of_a_network_are_padded_within_it() -> None:
    """Chains act on rows of their own: what is added to one must not write to a row of the other."""
    rows = torch.tensor([2, 0, 4])
    kv, weight = torch.randn(7, TEXT, 1), torch.rand(3, 1)
    net = LLLite(
        {
            "to_q": {
                "down.0.weight": torch.randn(2, 3), "down.0.bias": torch.randn(2),
                "mid.0.weight": torch.randn(2, 4), "mid.0.bias": torch.randn(2),
                "up.0.weight": torch.randn(3, 2), "up.0.bias": torch.randn(3),
            }
        }
    )  # fmt: skip
    lite = LiteInputs(rows, net, {"to_q": torch.randn(3, 5, 2)}, torch.rand(3))
    inputs = StepInputs(kv, contexts=(ContextInputs(rows, (), weight),), lites=(lite,))
    padded = Padding()(Step(torch.zeros(7, 1), torch.zeros(7), inputs)).inputs
    (chain,), (more,) = padded.contexts, padded.lites
    assert len(chain.rows) == len(chain.weight) == len(more.rows) == 4
    assert chain.rows.tolist() == [2, 0, 4, 4]
    assert torch.equal(chain.weight[3], weight[2]), "the same row is written twice, alike"
    x = torch.randn(8, 5, 3)
    changed = lite.change("to_q", x)
    assert not torch.allclose(changed, x)
    assert torch.allclose(more.change("to_q", x), changed)


def test_what_stays_the_same_is_padded_once_and_kept_no_longer_than_it_is_there() -> None:
    padding = Padding()
    kv, sample = torch.randn(3, TEXT, 2), torch.zeros(3, 1)
    first, second = (padding(Step(sample, torch.zeros(3), StepInputs(kv))).inputs.kv for _ in range(2))
    assert first is second
    assert padding(Step(sample, torch.zeros(3), StepInputs(kv.clone()))).inputs.kv is not first
    padding(Step(sample, torch.zeros(3), StepInputs(kv)))
    del kv, first, second
    gc.collect()
    assert not padding._made


def test_a_step_of_such_a_size_is_left_as_it_is() -> None:
    kv = torch.randn(4, TEXT, 2)
    step = Step(torch.zeros(4, 1), torch.zeros(4), StepInputs(kv))
    padded = Padding()(step)
    assert padded.inputs.kv is kv and padded.sample is step.sample and padded.inputs.kv_mask is None


def test_sizes_beyond_the_last_are_multiples_of_it() -> None:
    assert [bucket(count, ROWS) for count in (1, 3, 4, 5, 9, 32, 33, 64, 65)] == [1, 4, 4, 8, 12, 32, 64, 64, 96]


@dataclass
class Counted:
    """What a simulation found, as shares: of steps that capture or run eagerly, of rows and columns that are added."""

    captures: float
    eager: float
    rows: float
    columns: float

    def __str__(self) -> str:
        return (
            f"captures {self.captures:.2%}, eager {self.eager:.2%} of steps; "
            f"rows +{self.rows:.1%}, rank columns +{self.columns:.1%}"
        )


def simulate(mix: Mix, seed: int, *, pads: bool, steps: int = 20000, warm: int = 2000) -> Counted:
    """Run traffic through what a step runs through, with the number of graphs that are kept there."""
    taping, padding = Taping(), Padding()
    stepping = Stepping(Buffers(CPU), Graphs(taping))
    captured = Captured(stepping, lambda step: step.sample)
    captures = eager = rows = made_rows = columns = made_columns = 0
    for number, step in enumerate(itertools.islice(Traffic(mix, seed).steps(), steps)):
        padded = padding(step) if pads else step
        before, replays = stepping.graphs.captured, taping.replays
        captured(padded)
        if number < warm:
            continue
        captures += stepping.graphs.captured - before
        eager += taping.replays == replays
        rows, made_rows = rows + len(step.sample), made_rows + len(padded.sample)
        for factors, wide in ((step.inputs.factors, False), (padded.inputs.factors, True)):
            if factors is not None:
                count = factors.scale.shape[1] * (len(padded.sample) if wide else len(step.sample))
                columns, made_columns = columns + count * (not wide), made_columns + count * wide
    counted = steps - warm
    return Counted(captures / counted, eager / counted, made_rows / rows - 1, made_columns / columns - 1)


@pytest.mark.parametrize("arrivals", [0.10, 0.17, 0.22])
def test_varied_traffic_captures_in_half_a_percent_of_its_steps_at_most(arrivals: float) -> None:
    mix = Mix(arrivals=arrivals, full=0, pictures=0, nets=0)
    with torch.inference_mode():
        unpadded, padded = simulate(mix, 0, pads=False, steps=6000), simulate(mix, 0, pads=True)
    print(f"\n{arrivals} arrivals a step, unpadded: {unpadded}\n{' ' * 22}padded: {padded}")
    assert unpadded.captures > 0.05
    assert padded.captures <= 0.005
    assert padded.rows <= 0.1


def test_traffic_with_pictures_nets_and_full_layouts_captures_a_third_as_often_as_unpadded() -> None:
    mix = Mix(arrivals=0.17)
    with torch.inference_mode():
        unpadded, padded = (simulate(mix, 0, pads=pads, steps=8000) for pads in (False, True))
    print(f"\nunpadded: {unpadded}\n  padded: {padded}")
    assert padded.captures <= unpadded.captures / 3


def test_ranks_are_padded_to_what_is_listed() -> None:
    factors = Traffic(Mix(lora=1), 0)
    for step in itertools.islice(factors.steps(), 50):
        padded = Padding()(step).inputs.factors
        assert padded is not None and padded.scale.shape[1] // PAGE in PAGES
