"""The whole server without its front door: requests in, events out. Triton's bodies hold exactly one.

A few `admission` threads read and check requests. Three pass a request on from there: `conditioning` loads its adapters
and encodes its prompts, the loop denoises, `decoding` makes pixels. So neither reading nor loading stalls a step.
Events of one request come in order, from one thread at a time; a callback must return quickly and must not raise.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic

import numpy as np
import torch
from PIL.Image import fromarray

from scumble.errors import ScumbleError, Unavailable
from scumble.events import Done, Event, Failed, Pixels, Queued
from scumble.images import QUALITY, encode
from scumble.receipt import Receipt
from scumble.request import Options, Request
from scumble.stats import Stats
from scumble_registry import Registry
from scumble_server import request_log
from scumble_server.admission.admit import Admitted, admit
from scumble_server.admission.open_requests import OpenRequests
from scumble_server.base import Base
from scumble_server.bases import FailedBase, load_bases
from scumble_server.conditioning.condition import Conditioned, Conditioner
from scumble_server.config import ServerConfig
from scumble_server.denoise.counters import Counters
from scumble_server.denoise.decoding import decode
from scumble_server.denoise.heartbeat import UNKNOWN, Heartbeat
from scumble_server.denoise.image import ActiveRequest, Image
from scumble_server.denoise.loop import Loop
from scumble_server.denoise.noise import Noise
from scumble_server.denoise.original import start_from
from scumble_server.denoise.warm_up import warm_up
from scumble_server.executors.cuda import is_lost, mark, own_stream, settle
from scumble_server.memory.pages import Pools
from scumble_server.memory.prefetch import Prefetcher
from scumble_server.memory.residency import Lease, Residency
from scumble_server.receipt import make_receipt
from scumble_server.request.adapter import ResolvedAdapter
from scumble_server.request.ending import check_wanted, device_lost, stopping
from scumble_server.request.extremes import not_finite
from scumble_server.request.original import original_of
from scumble_server.switching import switch_often

log = logging.getLogger(__name__)

MAX_ID = 128
"""Characters of a caller's request id that are kept."""
READERS = 4
"""Requests that are read and checked at once. One that takes long holds up none that is open already."""


@dataclass(slots=True)
class _Job:
    """One request on its way through the threads. Its leases pin what its rows carry until it has ended."""

    on_event: Callable[[Event], None]
    is_cancelled: Callable[[], bool]
    device: Lease
    weights: Lease
    ahead: int
    """Requests that were open when it arrived."""
    arrival: int
    request_id: str
    submitted_at: float = field(default_factory=monotonic)
    deadline: float | None = None
    admitted: Admitted = field(init=False)
    current: Admitted = field(init=False)
    """The pass that it is in."""
    is_admitted: bool = False
    conditioned: Conditioned | None = None
    bound: tuple[ResolvedAdapter, ...] = ()
    """The adapters that acted in any pass so far."""
    layers: dict[ResolvedAdapter, int] = field(default_factory=dict)
    """How many layers each of them was bound to, if it is a LoRA."""
    active: ActiveRequest | None = None
    denoised: Callable[[], None] = lambda: None
    """Makes the decoding thread's work wait for the loop's."""
    spent: dict[str, float] = field(default_factory=dict)
    """Milliseconds of every pass so far."""

    def limit_by(self, options: Options) -> None:
        """Take the deadline from the request. Raises DeadlineExceeded if it has passed already."""
        if options.deadline_ms is not None:
            self.deadline = self.submitted_at + options.deadline_ms / 1e3
        self.check()

    def admit(self, admitted: Admitted) -> None:
        self.admitted = self.current = admitted
        self.is_admitted = True

    def check(self) -> None:
        """Raises Cancelled or DeadlineExceeded if nobody waits for it any more."""
        check_wanted(self.is_cancelled, self.deadline)


class Service:
    """Owns the bases, the registry's handle and the threads. `submit`, `stats`, `is_alive` and `close` may be
    called from any thread.
    """

    def __init__(
        self,
        config: ServerConfig,
        registry: Registry,
        bases: Sequence[Base | FailedBase],
        weights: Residency,
        heartbeat: Heartbeat = lambda _: None,
    ) -> None:
        """The first of `bases` is for requests that name none; `weights` holds what is loaded of them."""
        self._all_bases = tuple(bases)
        self.bases = tuple(base for base in bases if isinstance(base, Base))
        self._config = config
        self._registry = registry
        self._counters = Counters()
        least_expected = UNKNOWN if config.compile_steps else 0.0
        self._loop = Loop(config.max_batch_images, self._counters, heartbeat, least_expected)
        self._host = Residency(config.host_cache_bytes, "host")
        self._device = Residency(config.device_cache_bytes, "device")
        self._weights = weights
        self._pools = Pools(config.device_cache_bytes)
        self._conditioner = Conditioner(registry, self._host, self._pools)
        self._heartbeat = heartbeat
        self._warm = threading.Event()
        self._prefetcher = Prefetcher()
        # The most urgent first, then first come; the last of all ends the thread.
        self._incoming: queue.PriorityQueue[tuple[float, int, _Job | None]] = queue.PriorityQueue()
        self._arrivals = itertools.count()
        self._denoised: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._open_requests = OpenRequests(config.max_queue)
        self._readers = ThreadPoolExecutor(READERS, "admission")
        self._threads = [
            threading.Thread(target=self._guard, args=(work,), name=name, daemon=True)
            for name, work in (
                ("conditioning", self._condition_all),
                ("loop", self._draw_all),
                ("decoding", self._decode_all),
            )
        ]

    @classmethod
    def open(cls, config: ServerConfig, heartbeat: Heartbeat = lambda _: None) -> Service:
        """Load the bases and start; on CUDA, capture common steps. A base that cannot be loaded is logged, and requests
        for it are refused. Threads of this process take turns more often from then on (`switching`).

        Raises ScumbleError if the registry is not there or no base can be loaded.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        switch_often()
        registry = Registry.open(config.home, create=False)
        weights = Residency(config.weights_cache_bytes, "weight")
        try:
            with own_stream(config.device):
                bases = load_bases(registry, config, weights)
                settle(config.device)
        except BaseException:
            weights.clear()
            registry.close()
            raise
        service = cls(config, registry, bases, weights, heartbeat)
        for thread in service._threads:
            thread.start()
        service._warm.wait()
        return service

    def submit(
        self,
        request: Request | Callable[[], Request],
        on_event: Callable[[Event], None],
        is_cancelled: Callable[[], bool] = lambda: False,
        *,
        request_id: str = "",
    ) -> None:
        """Queue a request, or what reads one; returns at once, before it is read.

        Raises QueueFull, or Unavailable while the server stops. Afterwards `on_event` gets Queued, Step…, Preview…, and
        at last exactly one of Done and Failed: Failed alone, before any work, for a request that is refused.
        `is_cancelled` is asked before and after reading, before conditioning and once a step.
        `request_id` stands in the log and in errors; a request without one gets one.
        """
        request_id = request_id[:MAX_ID] or secrets.token_hex(8)
        ahead = self._enter(request_id)
        device, weights = self._device.open(), self._weights.open()
        job = _Job(on_event, is_cancelled, device, weights, ahead, next(self._arrivals), request_id)
        job.on_event = self._until_the_end(job)
        device.check = weights.check = job.check  # asked while they wait for room
        read = request if callable(request) else lambda: request
        try:
            self._readers.submit(self._admit, job, read)
        except RuntimeError:  # closed since it entered
            job.on_event(Failed(stopping()))

    def _enter(self, request_id: str) -> int:
        """Raises QueueFull or Unavailable."""
        try:
            return self._open_requests.enter()
        except Unavailable as error:
            refused = _with_id(error, request_id)
            self._log(request_id, None, Failed(refused), monotonic())
            raise refused from None

    def _admit(self, job: _Job, read: Callable[[], Request]) -> None:
        try:
            if self._open_requests.closed:
                raise stopping()
            job.check()
            request = read()
            job.limit_by(request.options)
            admitted = admit(request, self._all_bases, self._registry, self._config.max_pixels)
            job.check()
            job.admit(admitted)
        except Exception as error:
            job.on_event(Failed(_typed(error)))
            return
        self._counters.add("requests")
        job.on_event(Queued(job.ahead))
        self._enqueue(job)
        self._prefetcher.submit(lambda: self._conditioner.prefetch(admitted))

    def _enqueue(self, job: _Job) -> None:
        self._incoming.put((-job.admitted.request.options.priority, job.arrival, job))

    def stats(self) -> Stats:
        """Counters since the start."""
        return Stats(
            **self._counters.snapshot().model_dump(),
            open_requests=self._open_requests.count,
            base=self._all_bases[0].ref,
            bases=[base.version.ref for base in self.bases],
            host_cache=self._host.stats(),
            device_cache=self._device.stats(),
            weights_cache=self._weights.stats(),
            alive=self.is_alive(),
        )

    def is_alive(self) -> bool:
        """False once a thread has died; the server should then exit and be restarted."""
        return all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Finish the running step, fail what is left with Unavailable, end the threads, close what they used."""
        if not self._open_requests.close():
            return
        self._readers.shutdown()
        self._loop.close()
        for cache in (self._device, self._weights, self._host):
            cache.close()
        self._incoming.put((math.inf, next(self._arrivals), None))
        for thread in self._threads[:2]:
            thread.join()
        self._denoised.put(None)  # last, so that pictures that are done still reach their callers
        self._threads[2].join()
        while not self._incoming.empty():  # a second pass that nobody begins any more
            if (job := self._incoming.get()[2]) is not None:
                job.on_event(Failed(stopping()))
        self._prefetcher.close()
        for cache in (self._device, self._weights):
            cache.clear()
        self._registry.close()

    def _until_the_end(self, job: _Job) -> Callable[[Event], None]:
        """Passes events on; with the last one the request lets go of all that it holds."""
        on_event = job.on_event

        def send(event: Event) -> None:
            if isinstance(event, Failed):
                event = Failed(_with_id(event.error, job.request_id))
            if isinstance(event, Done | Failed):
                self._log(job.request_id, job.admitted if job.is_admitted else None, event, job.submitted_at)
                job.device.release()
                job.weights.release()
                self._open_requests.leave()
                if isinstance(event, Failed) and job.is_admitted:
                    self._counters.add("failed")
            on_event(event)

        return send

    def _log(self, request_id: str, admitted: Admitted | None, ended: Done | Failed, since: float) -> None:
        """Write the log's line of a request."""
        spent = (monotonic() - since) * 1e3
        request_log.write(request_id, admitted, ended, spent, prompts=self._config.log_prompts)

    def _guard(self, work: Callable[[], None]) -> None:
        device = self._config.device
        try:
            with own_stream(device, urgent=work == self._draw_all):
                work()
        except BaseException:
            log.exception("thread %s died", threading.current_thread().name)
            raise

    def _draw_all(self) -> None:
        try:
            if self._config.device == "cuda" and self._config.cuda_graphs:
                self._warm_up()
        finally:
            self._warm.set()
        self._loop.run()

    def _warm_up(self) -> None:
        """Capture common steps of the first base, in the thread that replays them. Raises only if the device is lost:
        what cannot be captured now may be later.
        """
        base, most = self.bases[0], self._config.max_batch_images
        try:
            with self._weights.open() as lease:
                beat = partial(self._heartbeat, UNKNOWN)
                warm_up(base, base.executor(lease), self._pools, most, before_each=beat)
            settle(self._config.device)
        except Exception as error:
            if is_lost(error, self._config.device):
                raise
            log.warning("steps were not captured at the start: %s", error)

    def _condition_all(self) -> None:
        while (job := self._incoming.get()[2]) is not None:
            if self._open_requests.closed:
                job.on_event(Failed(stopping()))
                continue
            try:
                job.check()
                job.conditioned = self._conditioner.condition(job.current, job.device, job.weights)
                job.active = self._start_images(job, job.conditioned)
                settle(self._config.device)
            except Exception as error:
                self._fail(job, error)
                continue
            self._loop.add(job.active)

    def _start_images(self, job: _Job, conditioned: Conditioned) -> ActiveRequest:
        current = job.current
        base, settings, table = current.base, current.settings, current.table
        scale = base.compatibility.vae_scale
        height, width = settings.height // scale, settings.width // scale
        device = conditioned.conditioning.phases[0].executor.device
        options = job.admitted.request.options
        request = ActiveRequest(
            job.on_event,
            job.is_cancelled,
            lambda _: self._hand_over(job),
            priority=options.priority,
            deadline=job.deadline,
            not_finite=partial(not_finite, request=job.admitted.request),
            preview=base.colours.preview,
            preview_every=options.preview_every or 0,
            steps_before=0 if current is job.admitted else job.admitted.table.steps,
            steps_after=current.second.table.steps if current.second is not None else 0,
        )
        originals = conditioned.originals
        for index, seed in enumerate(settings.seeds):
            noise = Noise(seed, height, width)
            sample = torch.zeros(4, height, width, device=device)
            image = Image(request, conditioned.conditioning, table, settings.guidance, sample, noise)
            image.rescale = options.guidance_rescale
            start_from(image, originals[index % len(originals)] if originals else None)
            request.images.append(image)
        return request

    def _hand_over(self, job: _Job) -> None:
        """To the decoding thread. Called from the loop's."""
        job.denoised = mark(self._config.device)
        self._denoised.put(job)

    def _fail(self, job: _Job, error: Exception) -> None:
        """End one request. Raises the error again if the device is lost: the thread ends, and the server restarts."""
        if is_lost(error, self._config.device):
            job.on_event(Failed(device_lost()))
            raise error
        job.on_event(Failed(_typed(error)))

    def _decode_all(self) -> None:
        while (job := self._denoised.get()) is not None:
            try:
                job.denoised()
                done = self._decode(job)
            except Exception as error:
                self._fail(job, error)
                continue
            if done is None:
                self._enqueue(job)
                continue
            self._counters.add("images", len(done.encoded) or len(done.images))
            job.on_event(done)

    def _decode(self, job: _Job) -> Done | None:
        """None if a second pass follows; the job is ready for it then."""
        active, conditioned = job.active, job.conditioned
        assert active is not None and conditioned is not None and active.joined_at is not None
        start = monotonic()
        latents = torch.stack([image.sample for image in active.images])
        if not latents.isfinite().all():
            raise active.not_finite(active.images[0].table.steps)
        pixels = decode(conditioned.vae, latents, tiled=job.admitted.request.options.vae_tiling).numpy()
        end = monotonic()
        spent = {
            "load": conditioned.load_ms,
            "encode": conditioned.encode_ms,
            "denoise": (active.finished_at - active.joined_at) * 1e3,
            "decode": (end - start) * 1e3,
        }
        job.spent = {name: value + job.spent.get(name, 0.0) for name, value in spent.items()}
        job.layers |= conditioned.layers
        job.bound += tuple(adapter for adapter in conditioned.adapters if adapter not in job.bound)
        if job.current.second is not None:
            mask = next((original.mask for original in job.current.originals), None)
            job.current = replace(
                job.current.second,
                vae=job.current.vae,
                originals=tuple(original_of(picture, mask) for picture in pixels),
            )
            job.device.release()  # what was made for this size
            return None
        total = (end - job.submitted_at) * 1e3
        timings = {"queue": total - sum(job.spent.values()), **job.spent, "total": total}
        maps = np.stack(conditioned.maps) if conditioned.maps else None
        return _done(
            pixels,
            make_receipt(job.admitted, replace(conditioned, adapters=job.bound, layers=job.layers), timings),
            maps,
            job.admitted.request.options,
            self._config.png_level,
        )


def _done(pixels: Pixels, receipt: Receipt, maps: Pixels | None, options: Options, png_level: int) -> Done:
    if options.format is None:
        return Done(pixels, receipt, maps)
    files = tuple(
        encode(
            fromarray(picture),
            options.format,
            receipt.of_image(index),
            options.quality or QUALITY,
            png_level=png_level,
        )
        for index, picture in enumerate(pixels)
    )
    return Done(np.zeros((0, 0, 0, 3), np.uint8), receipt, maps, files)


def _with_id(error: ScumbleError, request_id: str) -> ScumbleError:
    """A copy: what refuses one request may refuse others, too."""
    return type(error)(error.message, **error.fields | {"request_id": request_id})


def _typed(error: Exception) -> ScumbleError:
    """Make the error that a caller gets of one that nobody expected; the log has all of it."""
    if isinstance(error, ScumbleError):
        return error
    log.error("a request failed", exc_info=error)
    return ScumbleError(f"the server failed: {type(error).__name__}: {error}")
