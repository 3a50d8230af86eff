"""Who takes the next step: places, priorities, turns, cuts. The executor only notes what it is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from scumble.errors import Cancelled, DeadlineExceeded, IntegrityError, OutOfMemory, ScumbleError, Unavailable
from scumble.events import Event, Failed, Preview, Step
from scumble_build.graphs.inputs import StepInputs
from scumble_server.denoise.counters import Counters
from scumble_server.denoise.headroom import PATIENCE as PATIENCE_OF_ROOM
from scumble_server.denoise.image import ActiveRequest, Conditioning, Image
from scumble_server.denoise.loop import Loop
from scumble_server.denoise.noise import Noise
from scumble_server.denoise.phase import Phase
from scumble_server.denoise.schedule import PATIENCE
from scumble_server.denoise.schedulers import table
from scumble_server.executors.preview import LatentColours

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@dataclass
class Noting:
    """`steps` has the number of model rows of every call."""

    max_rows: int = 32
    device: str = "cpu"
    steps: list[int] = field(default_factory=list)
    before: Callable[[], None] = lambda: None

    def denoise(self, sample: Tensor, _timestep: Tensor, _inputs: StepInputs) -> Tensor:
        self.before()
        self.steps.append(len(sample))
        return torch.zeros_like(sample)


@dataclass
class Request:
    """One request in the loop; `events` are what its caller is told."""

    active: ActiveRequest
    events: list[Event]
    cancelled: threading.Event

    @property
    def steps(self) -> int:
        return len([event for event in self.events if isinstance(event, Step)])


def request(
    executor: Noting,
    *,
    steps: int = 4,
    images: int = 1,
    size: int = 8,
    order: list[str] | None = None,
    name: str = "",
    **about: object,
) -> Request:
    events: list[Event] = []
    cancelled = threading.Event()
    ends = order if order is not None else []
    active = ActiveRequest(events.append, cancelled.is_set, lambda _: ends.append(name), **about)  # type: ignore[arg-type]
    phase = Phase(executor, torch.zeros(1, 2, 3))  # type: ignore[arg-type]
    conditioning = Conditioning((phase,), (0,) * steps, frozenset())
    for _ in range(images):
        sample = torch.ones(4, size, size)
        active.images.append(
            Image(active, conditioning, table("ddim", SCHEDULE, steps), 1.0, sample, Noise(0, size, size))
        )
    return Request(active, events, cancelled)


def run(loop: Loop, requests: Sequence[Request], turns: int) -> None:
    """The loop's own thread, `turns` times around."""
    for each in requests:
        loop.add(each.active)
    for _ in range(turns):
        if not loop._wait_for_work():
            return
        loop._drop_ended()
        for batch in loop._next_batches(loop._active()):
            loop._step(batch)
            loop._leave(batch)
        if not (loop._images or loop._arrived):
            return


def test_a_higher_priority_takes_its_place_at_the_next_step_and_the_other_goes_on_later() -> None:
    executor, order = Noting(), []
    loop = Loop(1, Counters())
    low = request(executor, order=order, name="low")
    run(loop, [low], turns=2)
    high = request(executor, order=order, name="high", priority=1)
    run(loop, [high], turns=1)
    assert (low.steps, high.steps) == (2, 1)
    run(loop, [], turns=20)
    assert order == ["high", "low"]
    assert low.steps == 4


def test_equal_priorities_do_not_push_each_other_out() -> None:
    executor, order = Noting(), []
    requests = [request(executor, order=order, name=name) for name in "abc"]
    run(Loop(1, Counters()), requests, turns=30)
    assert order == ["a", "b", "c"]
    assert executor.steps == [1] * 12


def test_of_equal_priorities_the_nearest_deadline_goes_first() -> None:
    executor, order = Noting(), []
    now = time.monotonic()
    later = request(executor, order=order, name="later", deadline=now + 200)
    soon = request(executor, order=order, name="soon", deadline=now + 100)
    run(Loop(1, Counters()), [later, soon], turns=20)
    assert order == ["soon", "later"]


def test_who_waited_long_goes_before_a_higher_priority() -> None:
    executor, order = Noting(), []
    patient = request(executor, order=order, name="patient", queued_at=time.monotonic() - 3 * PATIENCE)
    urgent = request(executor, order=order, name="urgent", priority=2)
    run(Loop(1, Counters()), [urgent, patient], turns=20)
    assert order == ["patient", "urgent"]


def test_groups_take_turns_so_that_a_rare_one_is_not_starved() -> None:
    executor = Noting()
    loop = Loop(8, Counters())
    busy = [request(executor, steps=40) for _ in range(7)]
    rare = request(executor, steps=10, size=16)
    run(loop, [*busy, rare], turns=20)
    assert rare.steps == 10
    assert all(each.steps == 10 for each in busy)
    assert executor.steps == [7, 1] * 10


def test_rows_of_other_weights_are_another_group() -> None:
    base, variant = Noting(), Noting()
    run(Loop(8, Counters()), [request(base), request(variant), request(base)], turns=8)
    assert base.steps == [2] * 4
    assert variant.steps == [1] * 4


def test_a_group_that_is_larger_than_the_executor_takes_is_cut() -> None:
    executor = Noting(max_rows=3)
    requests = [request(executor, images=4), request(executor, images=3)]
    run(Loop(16, Counters()), requests, turns=4)
    assert executor.steps == [3, 3, 1] * 4
    assert [each.steps for each in requests] == [4, 4]


@pytest.mark.parametrize(("how", "error"), [("cancelled", Cancelled), ("deadline", DeadlineExceeded)])
def test_who_is_not_wanted_any_more_leaves_at_the_next_step(how: str, error: type[ScumbleError]) -> None:
    executor = Noting()
    loop = Loop(8, Counters())
    leaving, staying = request(executor, steps=9), request(executor, steps=9)
    run(loop, [leaving, staying], turns=2)
    if how == "cancelled":
        leaving.cancelled.set()
    else:
        leaving.active.deadline = time.monotonic() - 1
    run(loop, [], turns=1)
    last = leaving.events[-1]
    assert isinstance(last, Failed)
    assert isinstance(last.error, error)
    assert executor.steps == [2, 2, 1]


def test_previews_come_every_n_steps_and_not_with_the_last() -> None:
    colours = LatentColours(torch.tensor([[100.0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 50, 0]]))
    asking = request(Noting(), steps=6, images=2, preview=colours.preview, preview_every=2)
    run(Loop(8, Counters()), [asking], turns=6)
    previews = [event for event in asking.events if isinstance(event, Preview)]
    assert [(event.step, event.steps, event.images.shape) for event in previews] == [
        (2, 6, (2, 8, 8, 3)),
        (4, 6, (2, 8, 8, 3)),
    ]
    assert previews[0].images[..., 0].min() > 100  # ones, scaled by the schedule: noise was taken for nothing
    assert (previews[0].images[..., 1] == 50).all()


def test_nothing_is_kept_of_a_group_that_is_gone() -> None:
    loop = Loop(8, Counters())
    run(loop, [request(Noting())], turns=4)
    loop._next_batches(loop._active())
    assert not loop._batches


@dataclass
class Small(Noting):
    """Its device holds `room` model rows; `asked` has the rows of every call."""

    room: int = 3
    asked: list[int] = field(default_factory=list)

    def denoise(self, sample: Tensor, timestep: Tensor, inputs: StepInputs) -> Tensor:
        self.asked.append(len(sample))
        if len(sample) > self.room:
            raise OutOfMemory("no room", rows=len(sample))
        return super().denoise(sample, timestep, inputs)


def test_a_batch_that_does_not_fit_into_memory_takes_the_same_step_in_halves_and_stays_small() -> None:
    executor, counters = Small(), Counters()
    requests = [request(executor, steps=2) for _ in range(8)]
    run(Loop(8, counters), requests, turns=10)
    assert executor.asked == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert [each.steps for each in requests] == [2] * 8
    assert counters.snapshot().out_of_memory == 2
    assert counters.snapshot().failed_steps == 0


def test_an_image_that_does_not_fit_alone_ends_with_a_typed_error_and_the_others_go_on() -> None:
    executor, roomy = Small(room=0), Noting()
    large, other = request(executor, steps=2), request(roomy, steps=2)
    run(Loop(8, Counters()), [large, other], turns=10)
    (failed,) = [event for event in large.events if isinstance(event, Failed)]
    assert isinstance(failed.error, OutOfMemory)
    assert other.steps == 2


def test_after_many_good_steps_one_row_more_is_tried() -> None:
    executor = Small(room=3)
    loop = Loop(4, Counters())
    run(loop, [request(executor, steps=100) for _ in range(4)], turns=3)
    assert set(executor.steps) == {2}
    executor.room = 4
    run(loop, [], turns=PATIENCE_OF_ROOM)
    assert 3 in executor.steps
    assert executor.steps[-1] == 4


def test_a_typed_error_of_a_step_reaches_its_caller_as_it_is() -> None:
    def fail() -> None:
        raise IntegrityError("the plan is corrupt")

    mine = request(Noting(before=fail))
    run(Loop(1, Counters()), [mine], turns=2)
    (failed,) = [event for event in mine.events if isinstance(event, Failed)]
    assert isinstance(failed.error, IntegrityError)


def test_a_device_that_is_lost_ends_the_loop_and_whoever_waits_is_told_to_come_again() -> None:
    """Every later call would raise, whatever is asked: no image is to blame, and only a new process helps."""
    executor = Noting()
    requests = [request(executor), request(executor, size=16)]
    loop = Loop(8, Counters())

    def fail() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    executor.before = fail
    for each in requests:
        loop.add(each.active)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        loop.run()
    for each in requests:
        assert isinstance(each.events[-1], Failed)
        assert isinstance(each.events[-1].error, Unavailable)
        assert each.events[-1].error.fields["retry_after"] > 0
    late = request(executor)
    loop.add(late.active)
    assert isinstance(late.events[-1], Failed)


def test_any_other_error_of_a_step_is_its_images_own() -> None:
    executor = Noting()
    lost = request(executor)
    loop = Loop(8, Counters())

    def fail() -> None:
        raise RuntimeError("shapes differ")

    executor.before = fail
    run(loop, [lost], turns=2)
    assert isinstance(lost.events[-1], Failed)
    executor.before = lambda: None
    well = request(executor)
    run(loop, [well], turns=20)
    assert well.steps == 4
