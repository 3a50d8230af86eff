"""The service as its callers see it: events, cancellation, refusals, and a base that never changes."""

from __future__ import annotations

import io
import itertools
import random
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import PIL.Image
import pytest
import torch

from scumble.errors import (
    Cancelled,
    DeadlineExceeded,
    Incompatible,
    InvalidRequest,
    NotFound,
    QueueFull,
    Refused,
    ScumbleError,
    Unavailable,
)
from scumble.events import Done, Event, Failed, Queued, Step
from scumble.receipt import DroppedAdapter
from scumble.redraw import request_from_receipt
from scumble.request import Adapter, Options, Request, SchedulerName
from scumble_registry import Registry
from scumble_server.admission.admit import Admitted, admit
from scumble_server.config import ServerConfig
from scumble_server.denoise.heartbeat import IDLE, UNKNOWN
from scumble_server.denoise.noise import Noise
from scumble_server.service import READERS, Service

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.running import Running

PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 4, "guidance_scale": 5.0, "width": 64, "height": 64}


def request(**changes: Any) -> Request:
    return Request.parse({**PLAIN, **changes})


class Listener:
    """Collects events; `ended` is set by the last one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Done | Failed):
            self.ended.set()

    def wait(self) -> Event:
        assert self.ended.wait(60)
        return self.events[-1]


def test_events_come_in_order(running: Running) -> None:
    listener = Listener()
    running.service.submit(request(num_images=2), listener)
    assert isinstance(listener.wait(), Done)
    assert isinstance(listener.events[0], Queued)
    assert listener.events[1:-1] == [Step(step, 4) for step in (1, 2, 3, 4)]


def test_the_receipt_says_what_was_bound(running: Running) -> None:
    adapters = [Adapter(ref="l/a", weight=0.5), Adapter(ref="l/b", weight=0)]
    done = running.run([request(adapters=adapters, seed=None)])[0].done
    receipt = done.receipt
    with Registry.open(running.home) as registry:
        version = registry.resolve("l/a")
    assert [(each.ref, each.digest, each.details["rank"]) for each in receipt.adapters] == [("l/a", version.digest, 4)]
    assert receipt.dropped == (DroppedAdapter(ref="l/b", reason="weight 0"),)
    assert receipt.request.seed == receipt.seeds[0] >= 0
    assert set(receipt.timings_ms) == {"queue", "load", "encode", "denoise", "decode", "total"}


def test_the_receipt_is_json_in_an_order_that_stays(running: Running) -> None:
    """As in `tests/unit/client/receipt.json`, which is a server's; what is at its default is left out."""
    asked = request(adapters=[Adapter(ref="l/a", weight=1.0)], options=Options(priority=0, format="png"))
    data = running.run([asked])[0].done.receipt.to_json()
    top = "schema request base adapters dropped seeds engine timings_ms"
    assert list(data) == top.split()
    assert list(data["request"]) == [*Request.model_fields]
    assert data["request"]["adapters"] == [{"ref": "l/a"}]
    assert data["request"]["options"] == {"format": "png"}
    assert list(data["base"]) == ["name", "version", "digest", "ref"]
    of_adapter = "name version digest ref kind weight text_weight layers rank"
    assert list(data["adapters"][0]) == of_adapter.split()


def test_stats_are_json_that_says_all(running: Running) -> None:
    data = running.service.stats().to_json()
    counters = "requests images failed steps rows mixed_steps failed_steps out_of_memory batch_sizes step_seconds"
    caches = ["host_cache", "device_cache", "weights_cache"]
    assert list(data) == [*counters.split(), "open_requests", "base", "bases", *caches, "alive"]
    assert list(data["host_cache"]) == [
        "entries",
        "bytes",
        "held_bytes",
        "budget",
        "hits",
        "misses",
        "evictions",
        "waits",
    ]
    assert all(isinstance(size, str) for size in data["batch_sizes"])


def test_weight_zero_is_the_base(running: Running) -> None:
    bare = running.run([request()])[0]
    zero = running.run([request(adapters=[Adapter(ref="l/a", weight=0)])])[0]
    assert torch.equal(bare.latents, zero.latents)


def test_the_same_receipt_makes_the_same_picture(running: Running) -> None:
    first = running.run([request(adapters=[Adapter(ref="l/a")], seed=None)])[0]
    again = running.run([request_from_receipt(first.done.receipt)])[0]
    assert (first.done.images == again.done.images).all()


def test_two_hundred_random_requests_leave_the_base_as_it_was(running: Running) -> None:
    before = running.executor.weights_digest()
    rng = random.Random(0)
    requests = [
        request(
            seed=rng.randrange(2**31),
            steps=rng.randint(1, 3),
            scheduler=rng.choice(get_args(SchedulerName)),
            guidance_scale=rng.choice([1.0, 4.0]),
            width=rng.choice([64, 64, 64, 48]),
            adapters=[
                Adapter(ref=ref, weight=rng.uniform(-1, 1))
                for ref in rng.sample(["l/a", "l/b", "l/plain", "l/mixed"], rng.randint(0, 3))
            ],
        )
        for _ in range(200)
    ]
    assert len(running.run(requests)) == 200
    assert running.executor.weights_digest() == before


def test_sizes_take_turns(running: Running) -> None:
    """A rare size ends long before a busy one has drained."""
    busy = [request(steps=12, seed=i) for i in range(24)]
    rare = request(steps=12, width=48)
    ends: list[str] = []
    listeners = []
    for name, each in [*(("busy", one) for one in busy[:4]), ("rare", rare), *(("busy", one) for one in busy[4:])]:
        listener = Listener()
        listeners.append(listener)

        def on_event(event: Event, name: str = name, listener: Listener = listener) -> None:
            if isinstance(event, Done):
                ends.append(name)
            listener(event)

        running.service.submit(each, on_event)
    assert all(isinstance(listener.wait(), Done) for listener in listeners)
    assert ends.index("rare") < 12


def test_cancellation_ends_one_request_within_a_step(running: Running) -> None:
    cancelled = threading.Event()
    listener, neighbour = Listener(), Listener()

    def on_event(event: Event) -> None:
        if event == Step(3, 500):
            cancelled.set()
        listener(event)

    running.service.submit(request(steps=500), on_event, cancelled.is_set)
    running.service.submit(request(steps=20), neighbour)
    end = listener.wait()
    assert isinstance(end, Failed)
    assert isinstance(end.error, Cancelled)
    assert [event for event in listener.events if isinstance(event, Step)][-1] == Step(3, 500)
    assert isinstance(neighbour.wait(), Done)


def test_a_deadline_ends_a_request_that_is_late(running: Running) -> None:
    late, neighbour = Listener(), Listener()
    running.service.submit(request(steps=500, options={"deadline_ms": 300}), late)
    running.service.submit(request(steps=20, options={"deadline_ms": 60_000}), neighbour)
    end = late.wait()
    assert isinstance(end, Failed)
    assert isinstance(end.error, DeadlineExceeded)
    assert isinstance(neighbour.wait(), Done)


def test_a_higher_priority_overtakes_what_is_running(published: tuple[Path, dict[str, Path]]) -> None:
    service = Service.open(ServerConfig(home=published[0], base="tiny/base", max_batch_images=1))
    order: list[str] = []
    low, high = Listener(), Listener()

    def note(name: str, listener: Listener) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            if isinstance(event, Done):
                order.append(name)
            listener(event)
            if name == "low" and event == Step(3, 100):
                service.submit(request(options={"priority": 5}), note("high", high))

        return on_event

    service.submit(request(steps=100), note("low", low))
    low_end, high_end = low.wait(), high.wait()
    service.close()
    assert isinstance(low_end, Done)
    assert isinstance(high_end, Done)
    assert order == ["high", "low"]


def test_a_request_lets_go_of_all_that_it_held(running: Running) -> None:
    running.run([request(adapters=[Adapter(ref="l/a")], seed=i) for i in range(3)])
    for cache in (running.service._host, running.service._device, running.service._weights):
        assert cache.stats().held_bytes == 0


def test_what_a_waiting_request_will_read_is_there_before_its_turn(published: tuple[Path, dict[str, Path]]) -> None:
    service = Service.open(ServerConfig(home=published[0], base="tiny/base", device="cpu"))
    first, second, go = Listener(), Listener(), threading.Event()
    asked = itertools.count()
    # Asked before and after reading, then by the thread that conditions, which is held here.
    service.submit(request(), first, is_cancelled=lambda: next(asked) >= 2 and not go.wait(60))
    service.submit(request(adapters=[Adapter(ref="l/a")]), second)
    end = time.monotonic() + 30
    while service.stats().host_cache.entries == 0 and time.monotonic() < end:
        time.sleep(0.01)
    read_ahead = service.stats().host_cache
    go.set()
    assert isinstance(second.wait(), Done)
    assert read_ahead.entries == read_ahead.misses == service.stats().host_cache.misses == 1
    service.close()


def test_what_was_encoded_once_is_used_again(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = running.executor
    calls: list[str] = []
    for name in ("encode", "project"):
        made = getattr(executor, name)

        def noted(*args: Any, name: str = name, made: Any = made) -> Any:
            calls.append(name)
            return made(*args)

        monkeypatch.setattr(executor, name, noted)
    again = [Adapter(ref="l/a", weight=0.3)]
    words = {"prompt": "seen once", "negative_prompt": "nor by others"}
    first, second = (running.run([request(**words, adapters=again)])[0] for _ in range(2))
    once = ["encode", "encode", "project"]  # the negative prompt, the prompt; both at once
    assert calls == once
    assert torch.equal(first.latents, second.latents)
    running.run([request(**words, adapters=[Adapter(ref="l/a", weight=0.3, text_weight=0.2)])])
    running.run([request(**words, adapters=[Adapter(ref="l/a", weight=0.4, text_weight=0.3)])])
    assert calls == [*once, *once, "project"], "what was read differs"


def test_a_broken_row_fails_alone(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds decide: the row of seed 13 starts as NaN, its neighbours end well."""
    import scumble_server.service as module

    class Unlucky(Noise):
        def __init__(self, seed: int, height: int, width: int) -> None:
            super().__init__(seed, height, width)
            self.factor = float("nan") if seed == 13 else 1.0

        def draw(self) -> torch.Tensor:
            return super().draw() * self.factor

    monkeypatch.setattr(module, "Noise", Unlucky)
    listeners = [Listener() for _ in range(3)]
    for seed, listener in zip((12, 13, 14), listeners, strict=True):
        running.service.submit(request(seed=seed), listener)
    ends = [listener.wait() for listener in listeners]
    assert [type(end) for end in ends] == [Done, Failed, Done]
    assert "NaN" in ends[1].error.message  # type: ignore[union-attr]


@pytest.mark.parametrize("broken_step", [2, 4])
def test_what_breaks_in_the_middle_or_in_the_last_step_is_told(
    running: Running, monkeypatch: pytest.MonkeyPatch, broken_step: int
) -> None:
    """The loop looks at a step while the next is computed; at the last one, whoever decodes it looks."""
    executor, taken = running.executor, itertools.count(1)
    denoise = executor.denoise

    def breaking(*step: Any) -> torch.Tensor:
        return denoise(*step) * (float("nan") if next(taken) == broken_step else 1.0)

    monkeypatch.setattr(executor, "denoise", breaking)
    listener = Listener()
    running.service.submit(request(steps=4), listener)
    end = listener.wait()
    assert isinstance(end, Failed)
    assert end.error.message.startswith(f"the picture became NaN or infinite in step {broken_step};")


def test_a_step_that_raises_ends_only_the_row_to_blame(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = running.executor
    denoise = executor.denoise

    def picky(sample: torch.Tensor, timestep: torch.Tensor, *rest: Any) -> torch.Tensor:
        if (timestep == 251).any():
            raise RuntimeError("not this one")
        return denoise(sample, timestep, *rest)

    monkeypatch.setattr(executor, "denoise", picky)
    bad, good = Listener(), Listener()
    running.service.submit(request(steps=30), good)  # its timesteps are 1 + 33·i
    running.service.submit(request(steps=4), bad)  # 751, 501, 251
    assert isinstance(bad.wait(), Failed)
    assert isinstance(good.wait(), Done)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"adapters": [Adapter(ref="l/none")]}, NotFound, "l/none"),
        ({"adapters": [Adapter(ref="l/a@9")]}, NotFound, "9"),
        ({"adapters": [Adapter(ref="l//a")]}, InvalidRequest, "l//a"),
        ({"adapters": [Adapter(ref="tiny/base")]}, Refused, "base"),
        ({"adapters": [Adapter(ref="other/lora")]}, Incompatible, "down_blocks"),
        ({"adapters": [{"ref": "l/a", "images": ["a"]}]}, InvalidRequest, "images means nothing"),
        ({"adapters": [{"ref": "l/a", "mode": "guess"}]}, InvalidRequest, "mode means nothing"),
        ({"adapters": [{"ref": "l/a"}], "images": {"a": b"x"}}, InvalidRequest, "nothing names it"),
        ({"adapters": [{"ref": "l/a", "images": ["a"]}], "images": {"a": b"x"}}, InvalidRequest, "no picture"),
        ({"base": "l/a"}, Refused, "tiny/base"),
        ({"base": "no/base"}, NotFound, "no/base"),
        ({"width": 1024, "height": 1032}, InvalidRequest, "1024x1032"),
        ({"steps": 1000, "scheduler": "dpmpp_2m", "width": 2048, "height": 2048}, InvalidRequest, "pixels"),
    ],
)
@pytest.mark.usefixtures("extra")
def test_bad_input_is_refused_at_the_edge(
    running: Running, changes: dict[str, Any], error: type[ScumbleError], says: str
) -> None:
    before = running.service.stats().requests
    with pytest.raises(error, match=says):
        running.run([request(**changes)])
    assert running.service.stats().requests == before
    assert len(running.run([request()])) == 1, "the server goes on"


@pytest.fixture(scope="session")
def extra(
    published: tuple[Path, dict[str, Path]],
    make_lora: Callable[..., Path],
    make_tiny_base: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A LoRA of a wider base, and one whose rank leaves no room for a second."""
    home, files = published
    folder = tmp_path_factory.mktemp("extra")
    wider = make_tiny_base(folder / "wider", width=24)
    with Registry.open(home) as registry:
        registry.publish(make_lora(wider, folder / "other", seed=1), name="other/lora")
        registry.publish(make_lora(files["base"], folder / "big", seed=1, rank=160), name="big/lora")


def test_a_full_queue_says_when_to_try_again(published: tuple[Path, dict[str, Path]]) -> None:
    service = Service.open(ServerConfig(home=published[0], base="tiny/base", max_queue=2))
    first, second = Listener(), Listener()
    service.submit(request(steps=200), first)
    service.submit(request(steps=200), second)
    with pytest.raises(QueueFull) as caught:
        service.submit(request(), Listener())
    assert caught.value.fields["retry_after"] > 0
    service.close()
    assert all(isinstance(listener.wait(), Failed) for listener in (first, second)), "closing ends what is open"


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Whatever reads the prompt "hold" takes until this is set."""
    import scumble_server.service as module

    go = threading.Event()

    def slow(request: Request, *rest: Any) -> Admitted:
        if request.prompt == "hold":
            assert go.wait(60)
        return admit(request, *rest)

    monkeypatch.setattr(module, "admit", slow)
    yield go
    go.set()


def test_while_one_request_is_read_others_step_and_stats_answer(running: Running, held: threading.Event) -> None:
    reading, neighbour = Listener(), Listener()
    running.service.submit(request(prompt="hold"), reading)
    running.service.submit(request(), neighbour)
    assert isinstance(neighbour.wait(), Done)
    assert running.service.stats().open_requests == 1
    assert reading.events == []
    held.set()
    assert isinstance(reading.wait(), Done)


def test_the_queue_is_looked_at_before_a_request_is_read(
    published: tuple[Path, dict[str, Path]], held: threading.Event
) -> None:
    service = Service.open(ServerConfig(home=published[0], base="tiny/base", max_queue=1))
    first = Listener()
    service.submit(request(prompt="hold"), first)
    with pytest.raises(QueueFull):
        service.submit(lambda: pytest.fail("it was read"), Listener())
    held.set()
    assert isinstance(first.wait(), Done)
    service.close()


def test_a_deadline_that_passes_before_admission_spares_the_work(
    running: Running, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding = [Listener() for _ in range(READERS)]
    for listener in holding:
        running.service.submit(request(prompt="hold"), listener)
    late = Listener()
    running.service.submit(request(options={"deadline_ms": 1}), late)
    time.sleep(0.01)
    monkeypatch.setattr("scumble_server.service.admit", lambda *_: pytest.fail("it was read"))
    held.set()
    end = late.wait()
    assert isinstance(end, Failed)
    assert isinstance(end.error, DeadlineExceeded)
    assert all(isinstance(listener.wait(), Done) for listener in holding)


def test_closing_ends_what_waits_to_be_read(published: tuple[Path, dict[str, Path]], held: threading.Event) -> None:
    service = Service.open(ServerConfig(home=published[0], base="tiny/base"))
    listeners = [Listener() for _ in range(READERS + 2)]
    for listener in listeners:
        service.submit(request(prompt="hold"), listener)
    closing = threading.Thread(target=service.close)
    closing.start()
    while not service._open_requests.closed:
        time.sleep(0.01)
    held.set()
    ends = [listener.wait() for listener in listeners]
    closing.join(60)
    assert [end.error.code for end in ends if isinstance(end, Failed)] == ["unavailable"] * len(listeners)
    with pytest.raises(Unavailable):
        service.submit(request(), Listener())


def test_the_loop_beats_while_it_waits_and_before_each_step(published: tuple[Path, dict[str, Path]]) -> None:
    beats: list[float] = []
    service = Service.open(ServerConfig(home=published[0], base="tiny/base"), beats.append)
    listener = Listener()
    service.submit(request(steps=4), listener)
    listener.wait()
    time.sleep(2.5 * IDLE)
    service.close()
    assert beats[0] == IDLE
    busy = [beat for beat in beats if beat != IDLE]
    assert busy[0] == UNKNOWN, "the first step of its kind may take long"
    assert len(busy) == 4
    assert max(busy[1:]) < UNKNOWN
    assert beats[-2:] == [IDLE, IDLE], "an idle loop goes on beating"


def test_a_server_without_registry_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="registry missing"):
        Service.open(ServerConfig(home=tmp_path / "none", base="tiny/base"))


def test_an_adapter_is_no_base(published: tuple[Path, dict[str, Path]]) -> None:
    with pytest.raises(Refused, match="not a base"):
        Service.open(ServerConfig(home=published[0], base="l/a"))


def test_pngs_are_as_small_as_the_configuration_asks_and_always_the_same_picture(
    published: tuple[Path, dict[str, Path]], start: Callable[..., Running]
) -> None:
    home, files = published
    files_by_level = {}
    for level in (0, 1, 9):
        running = start(home, "tiny/base", files, png_level=level)
        (files_by_level[level],) = running.run([request(options=Options(format="png"))])[0].done.encoded
        running.service.close()
    assert len(files_by_level[0]) > len(files_by_level[1]) > len(files_by_level[9])
    pictures = [np.asarray(PIL.Image.open(io.BytesIO(content))) for content in files_by_level.values()]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
