"""Who steps next: the loop's policy, and nothing else.

Before each step, at most `max_images` images are active: the most urgent. Of those, one group takes its step, the one
whose turn was longest ago, so that a rare group (another checkpoint, another size) is not starved by a busy one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from scumble_server.denoise.image import Image

PATIENCE = 10.0
"""Seconds of waiting that weigh as much as one level of priority, so that nobody waits for ever."""


def most_urgent(images: Sequence[Image], most: int, now: float) -> list[Image]:
    """Choose at most `most` images: by priority and how long they waited to join; then those that have begun, the
    nearest deadline, first come. One that is not chosen keeps its place in its schedule.
    """

    def urgency(image: Image) -> tuple[float, bool, float, float]:
        request = image.request
        waited = (request.joined_at or now) - request.queued_at
        deadline = request.deadline if request.deadline is not None else float("inf")
        return -(request.priority + waited // PATIENCE), image.step == 0, deadline, request.queued_at

    return sorted(images, key=urgency)[:most]


class Turns:
    """Remembers which group stepped when. Used by the loop's thread alone."""

    def __init__(self) -> None:
        self._turn = 0
        self._last: dict[Hashable, int] = {}

    def next_of(self, images: Sequence[Image]) -> list[Image]:
        """The images of the group whose turn it is; groups that have left are forgotten."""
        groups: dict[Hashable, list[Image]] = {}
        for image in images:
            groups.setdefault(image.group, []).append(image)
        if not groups:
            return []
        self._last = {group: self._last.get(group, -1) for group in groups}
        group = min(groups, key=self._last.__getitem__)
        self._turn += 1
        self._last[group] = self._turn
        return groups[group]
