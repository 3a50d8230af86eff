"""The denoise loop: steps are batched, not requests. Images join and leave between two steps.

One thread runs `run`; `add` and `close` may be called from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch

from scumble.errors import Cancelled, DeadlineExceeded, OutOfMemory, ScumbleError
from scumble.events import Failed
from scumble_server.denoise.batch import Batch
from scumble_server.denoise.counters import Counters
from scumble_server.denoise.headroom import Headroom
from scumble_server.denoise.heartbeat import IDLE, Heartbeat, StepTimes
from scumble_server.denoise.image import ActiveRequest, Image
from scumble_server.denoise.schedule import Turns, most_urgent
from scumble_server.executors.cuda import is_lost, read_later, settle
from scumble_server.request.ending import check_wanted, device_lost, stopping

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Unchecked:
    """A step of which nobody has looked whether it was finite: its images with their numbers of steps."""

    images: list[tuple[Image, int]]
    finite: Callable[[], list[bool]]


class Loop:
    """Owns the images that are being denoised; at most `max_images` are active, chosen anew before each step."""

    def __init__(
        self, max_images: int, counters: Counters, heartbeat: Heartbeat = lambda _: None, least_expected: float = 0.0
    ) -> None:
        """`least_expected`: seconds that any step may take, as one whose structure is new does where it is compiled."""
        self._max_images = max_images
        self._heartbeat = heartbeat
        self._step_times = StepTimes(least_expected)
        self._counters = counters
        self._arrived: list[Image] = []
        self._images: list[Image] = []
        self._batches: dict[Hashable, list[Batch]] = {}
        self._turns = Turns()
        self._headroom = Headroom()
        self._unchecked: _Unchecked | None = None
        self._changed = threading.Condition()
        self._closing = False

    def add(self, request: ActiveRequest) -> None:
        """Queue the images of a request whose conditioning is resident."""
        with self._changed:
            if self._closing:
                request.fail(Failed(stopping()))
                return
            self._arrived.extend(request.images)
            self._changed.notify()

    def close(self) -> None:
        """Let the running step end, fail whatever is left, and end `run`."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def run(self) -> None:
        """Draw until `close`. Raises what the device raised if it is lost; whatever is left has failed then."""
        try:
            while self._wait_for_work():
                self._drop_ended()
                for batch in self._next_batches(self._active()):
                    self._step(batch)
                    self._leave(batch)
        except BaseException:
            self._fail_all(device_lost)
            raise
        self._fail_all(stopping)

    def _fail_all(self, error: Callable[[], ScumbleError]) -> None:
        with self._changed:
            self._closing = True
            left = [*self._images, *self._arrived]
        for image in left:
            image.request.fail(Failed(error()))

    def _wait_for_work(self) -> bool:
        with self._changed:
            if not self._images:
                self._unchecked = None  # whatever was in it is being decoded, which looks at it too
            while not (self._arrived or self._images or self._closing):
                self._heartbeat(IDLE)
                self._changed.wait(IDLE)
            self._images += self._arrived
            self._arrived.clear()
            return not self._closing

    def _drop_ended(self) -> None:
        """Ask each request once a step, whether its images wait or run."""
        for request in _requests(self._images):
            try:
                check_wanted(request.is_cancelled, request.deadline)
            except (Cancelled, DeadlineExceeded) as error:
                self._end(request, error)

    def _active(self) -> list[Image]:
        active = most_urgent(self._images, self._max_images, time.monotonic())
        for image in active:
            image.request.join()
        return active

    def _next_batches(self, active: list[Image]) -> list[Batch]:
        """The batches of the group whose turn it is. A group that is too large for the executor is cut, and all its
        parts take their step.
        """
        images = self._turns.next_of(active)
        if not images:
            self._batches.clear()
            return []
        known = [batch for batches in self._batches.values() for batch in batches]
        parts = self._cut(images)
        batches = [next((batch for batch in known if batch.fits(part)), None) or Batch(part) for part in parts]
        groups = {image.group for image in active}
        self._batches = {group: made for group, made in self._batches.items() if group in groups}
        self._batches[images[0].group] = batches
        return batches

    def _step(self, batch: Batch) -> None:
        start, group = time.monotonic(), batch.images[0].group
        kind = group, batch.model_rows
        self._heartbeat(self._step_times.expected(kind))
        try:
            with torch.inference_mode():
                finite = read_later(batch.advance())
        except OutOfMemory as error:
            self._shrink(batch, error)
            return
        except Exception as error:
            self._blame(batch, error)
            return
        self._headroom.went_well(group)
        self._step_times.took(kind, time.monotonic() - start)
        self._counters.step(len(batch.images), batch.model_rows, batch.mixed(), time.monotonic() - start)
        before, self._unchecked = self._unchecked, _Unchecked([(image, image.step) for image in batch.images], finite)
        if before is not None:
            self._check(before)

    def _check(self, step: _Unchecked) -> None:
        """Look at a step while the device computes the next one, so that it never waits for this thread. That also
        keeps this thread from running ahead of it by more than a step.
        """
        for (image, number), is_finite in zip(step.images, step.finite(), strict=True):
            if not is_finite:
                self._end(image.request, image.request.not_finite(number))

    def _blame(self, batch: Batch, error: Exception) -> None:
        """A step that fails touched no image. Each tries it alone, so that only the one to blame ends.

        Raises the error again if the device is lost, which is no image's fault.
        """
        if is_lost(error, batch.device):
            raise error
        log.error("a step of %d images failed", len(batch.images), exc_info=error)
        self._counters.add("failed_steps")
        if len(batch.images) > 1:
            for image in batch.images:
                self._step(Batch([image]))
        else:
            typed = error if isinstance(error, ScumbleError) else None
            self._end(batch.images[0].request, typed or ScumbleError(f"the step failed on the server: {error}"))

    def _shrink(self, batch: Batch, error: OutOfMemory) -> None:
        """Such a step touched no image either. They take it in smaller parts; one image that does not fit ends."""
        self._counters.add("out_of_memory")
        if len(batch.images) == 1:
            log.error("one image does not fit into the device's memory: %s", error)
            self._end(batch.images[0].request, error)
            return
        group, executor = batch.images[0].group, batch.images[0].phase.executor
        self._headroom.ran_out(group, batch.model_rows, executor.max_rows)
        limit = self._headroom.limit(group, executor.max_rows)
        log.warning("device memory ran out in a step of %d rows; they go on by %d", batch.model_rows, limit)
        left = batch.images
        while left:  # cut anew each time: what went wrong once more has made the parts smaller
            part = self._cut(left)[0]
            self._step(Batch(part))
            left = left[len(part) :]

    def _leave(self, batch: Batch) -> None:
        """Report progress, and hand requests whose images are all done to the decoder."""
        for request in _requests(batch.images):
            if request.ended:
                continue
            request.report()
            if all(image.done for image in request.images):
                request.ended = True
                request.finished_at = time.monotonic()
                request.on_denoised(request)
        self._forget(lambda image: image.done or image.request.ended)

    def _end(self, request: ActiveRequest, error: ScumbleError) -> None:
        settle(request.images[0].sample.device)  # what it held may be given to others at once
        request.fail(Failed(error))
        self._forget(lambda image: image.request is request)

    def _forget(self, gone: Callable[[Image], bool]) -> None:
        self._images = [image for image in self._images if not gone(image)]

    def _cut(self, images: list[Image]) -> list[list[Image]]:
        """Cut into parts of no more model rows than the executor takes and memory holds; one image always goes."""
        limit = self._headroom.limit(images[0].group, images[0].phase.executor.max_rows)
        parts: list[list[Image]] = [[]]
        filled = 0
        for image in images:
            size = image.phase.rows
            if parts[-1] and filled + size > limit:
                parts.append([])
                filled = 0
            parts[-1].append(image)
            filled += size
        return parts


def _requests(images: Iterable[Image]) -> list[ActiveRequest]:
    """The requests of these images, each once."""
    return list({id(image.request): image.request for image in images}.values())
