"""On a pretended GPU every kind of request is drawn as on the CPU, alone and with strangers.

Mixing devices raises there as CUDA does, and steps are captured by a lint (`support/capture_lint.py`). What only a GPU
can show, its kernels, streams and graphs, is not shown.
"""

from __future__ import annotations

import contextlib
import queue
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scumble.events import Done, Event, Failed
from scumble.request import Request
from scumble_registry import Registry
from scumble_server import service as service_module
from scumble_server.config import ServerConfig
from scumble_server.executors.device import Buffers, Graphs, Stepping
from scumble_server.service import Service
from support.capture_lint import LintedCapture
from support.every_kind import EveryKind, publish_every_kind, random_request, request_for, ways_to_ask
from support.pretended_gpu import BESIDE, GPU, Watching, pretended


@dataclass
class Both:
    every: EveryKind
    loop: Watching
    """What the loop's thread does on the pretended GPU."""
    decoding: Watching
    """What the decoding thread does there."""
    urgent: dict[str, bool]
    """The threads that have a stream of their own, and whether its kernels go first."""
    cpu: Service
    gpu: Service
    lints: list[LintedCapture]


@pytest.fixture(scope="module")
def both(tiny_base: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    home = tmp_path_factory.mktemp("both")
    with Registry.open(home, create=True) as registry:
        every = publish_every_kind(registry, tiny_base, tmp_path_factory.mktemp("kinds"))
    config = ServerConfig(home=home, base="every/base", threads=1, executor="torch")

    @contextmanager
    def own_stream(device: str, *, urgent: bool = False) -> Iterator[None]:
        if device == "cpu":
            yield
            return
        with Watching() as watching:
            streams[threading.current_thread().name] = watching, urgent
            yield

    def stepping(device: Any, *, graphs: bool = True) -> Stepping:  # noqa: ARG001 - always
        lint, buffers = LintedCapture(), Buffers(device)
        lint.of(buffers)
        lints.append(lint)
        return Stepping(buffers, Graphs(lint))

    lints: list[LintedCapture] = []
    streams: dict[str, tuple[Watching, bool]] = {}
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(service_module, "own_stream", own_stream)
        patches.setattr(Stepping, "on", stepping)
        cpu = Service.open(config)
        with pretended() as device:
            gpu = Service.open(config.model_copy(update={"device": str(device)}))
            urgent = {name: first for name, (_, first) in streams.items()}
            yield Both(every, streams["loop"][0], streams["decoding"][0], urgent, cpu, gpu, lints)
            gpu.close()
        cpu.close()


def draw(service: Service, requests: list[Request]) -> list[Done]:
    """All at once. Raises the first failure."""
    ends: list[queue.Queue[Event]] = [queue.Queue() for _ in requests]
    for request, end in zip(requests, ends, strict=True):
        service.submit(request, lambda event, end=end: end.put(event) if isinstance(event, Done | Failed) else None)  # type: ignore[misc]
    done = []
    for end in ends:
        event = end.get(timeout=300)
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Done)
        done.append(event)
    return done


def check_equal(both: Both, requests: list[Request]) -> None:
    for request, theirs in zip(requests, draw(both.gpu, requests), strict=True):
        (expected,) = draw(both.cpu, [request])
        if theirs.encoded:
            continue
        assert abs(theirs.images.astype(int) - expected.images.astype(int)).max() <= 1
    assert [lint.faults for lint in both.lints if lint.faults] == []


def replays(both: Both) -> int:
    return sum(lint.replayed for lint in both.lints)


PLAIN = {"prompt": "a <bad> apple", "steps": 3, "seed": 7, "width": 64, "height": 64, "scheduler": "euler_a"}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "webui": {"options": {"grammar": "webui"}, "prompt": "a ([apple:pear:0.5]:1.3) AND a boat :0.7"},
    "compel": {"options": {"grammar": "compel"}, "prompt": "a (red)1.3 boat"},
    "img2img": {"options": {"image": "red", "strength": 0.6}},
    "inpainting": {"options": {"image": "red", "mask": "left"}},
    "hires": {"options": {"hires": {"scale": 2.0}}},
    "previews": {"options": {"preview_every": 1}},
    "tiles": {"options": {"vae_tiling": True}},
    "rescale": {"options": {"guidance_rescale": 0.7}},
    "files": {"options": {"format": "png"}},
}


@pytest.mark.parametrize("name", sorted(ways_to_ask(random.Random(0))))
def test_each_kind_of_adapter_is_drawn_as_on_the_cpu(both: Both, name: str) -> None:
    way = ways_to_ask(random.Random(0))[name]
    request = request_for(both.every, [{"ref": name, **way}], **{**PLAIN, "steps": 4})
    check_equal(both, [request])
    before = replays(both)
    check_equal(both, [request.model_copy(update={"seed": 8})])
    assert replays(both) > before, "its steps are captured, and linted"


@pytest.mark.parametrize("name", OTHERS)
def test_each_other_way_to_ask_is_drawn_as_on_the_cpu(both: Both, name: str) -> None:
    fields = OTHERS[name]
    pictures = {each: both.every.pictures[each] for each in ("red", "left")}
    images = {key: value for key, value in pictures.items() if key in fields.get("options", {}).values()}
    check_equal(both, [Request.parse({**PLAIN, "images": images, **fields})])


@pytest.mark.parametrize("seed", [0, 1])
def test_strangers_are_drawn_as_each_alone_on_the_cpu(both: Both, seed: int) -> None:
    rng = random.Random(seed)
    check_equal(both, [random_request(both.every, rng) for _ in range(6)])


def test_devices_that_are_mixed_raise(both: Both) -> None:  # noqa: ARG001 - the device is there
    with Watching(), pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.zeros(2, device="gpu:0") + torch.ones(2)
    with Watching():
        assert np.array_equal((torch.zeros(2, device="gpu:0") + 1).cpu().numpy(), [1, 1])


def in_more_steps(both: Both, requests: list[Request]) -> dict[tuple[str, str], int]:
    """What three more steps of the same requests copy and wait for, by kind and line."""
    counts = []
    for steps in (5, 8):
        before = both.loop.notes.copy()
        draw(both.gpu, [request.model_copy(update={"steps": steps}) for request in requests])
        counts.append(both.loop.notes - before)
    return dict(counts[1] - counts[0])


@pytest.mark.parametrize("name", ["plain", *sorted(ways_to_ask(random.Random(0)))])
def test_from_its_second_step_on_a_batch_copies_and_waits_for_nothing_but_fresh_noise_and_the_last_steps_check(
    both: Both, name: str
) -> None:
    way = ways_to_ask(random.Random(0)).get(name)
    adapters = [] if way is None else [{"ref": name, **way, "start": 0.0, "end": 1.0}]
    fields = {**PLAIN, "options": {"guidance_rescale": 0.5}}
    for scheduler, expected in (("euler_a", {"read_later", "of_this_step"}), ("ddim", {"read_later"})):
        more = in_more_steps(both, [request_for(both.every, adapters, **{**fields, "scheduler": scheduler})])
        assert {kind for kind, _ in more} == {BESIDE}, more
        assert {line.rpartition(" ")[2] for _, line in more} == expected


CAPTURES: dict[str, tuple[Callable[[Tensor, Tensor], object], str]] = {
    "sound": (lambda fixed, _other: (fixed + 1) * 2, ""),
    "foreign": (lambda fixed, other: fixed + other, r"add.* reads \(3,\) from outside"),
    "host": (lambda fixed, _other: fixed.copy_(torch.ones(3)), "reads a host tensor"),
    "wait": (lambda fixed, _other: fixed[fixed.sum() > 0], "waits for the device"),
    "item": (lambda fixed, _other: fixed.sum().item(), "_local_scalar_dense.* waits for the device"),
}


@pytest.mark.parametrize("name", CAPTURES)
def test_a_capture_that_would_hold_a_fault_is_told(both: Both, name: str) -> None:  # noqa: ARG001 - the device is there
    work, fault = CAPTURES[name]
    with Watching():
        buffers, lint = Buffers(GPU), LintedCapture()
        lint.of(buffers)
        fixed, other = buffers.fill("x", torch.ones(3)), torch.ones(3, device=GPU)
        with contextlib.suppress(AssertionError):
            lint(lambda: work(fixed, other))
    assert re.search(fault, " ".join(lint.faults))
    assert len(lint.faults) == (name != "sound")


def test_pictures_are_decoded_on_a_stream_of_their_own_that_lets_the_steps_go_first(both: Both) -> None:
    assert both.urgent["loop"] and not both.urgent["decoding"] and not both.urgent["conditioning"]
    before = both.loop.notes.copy(), both.decoding.notes.copy()
    draw(both.gpu, [Request.parse(PLAIN)])
    of_loop, of_decoding = both.loop.notes - before[0], both.decoding.notes - before[1]
    assert any("executors/torch/vae.py" in line for _, line in of_decoding)
    assert not any("executors/torch/vae.py" in line for _, line in of_loop)


def test_convolutions_weights_have_their_channels_last_on_a_gpu(both: Both) -> None:
    with both.gpu._weights.open() as lease:
        executor = both.gpu.bases[0].executor(lease)
        states = executor.graphs.states  # type: ignore[attr-defined]
    for component in ("unet", "vae"):
        kernels = [tensor for tensor in states[component].values() if tensor.ndim == 4]
        assert kernels and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in kernels)
