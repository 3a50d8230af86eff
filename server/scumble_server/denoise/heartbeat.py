"""How the loop shows that it runs: before it waits or works it says when it will say so again."""

from __future__ import annotations

from collections.abc import Callable, Hashable

IDLE = 0.5
"""Seconds after which a loop that waits for work beats again."""
UNKNOWN = 30.0
"""Seconds that a step may take which is the first of its kind: kernels are chosen, graphs are captured."""
REMEMBERED = 1024

Heartbeat = Callable[[float], None]
"""Takes the seconds until the next beat, as expected. Called from the loop's thread; must return quickly."""


class StepTimes:
    """How long steps of a kind took lately. A kind is known by its hash alone, so that it keeps nothing alive.

    Used by the loop's thread alone.
    """

    def __init__(self, least: float = 0.0) -> None:
        """`least`: seconds below which no step is expected."""
        self._least = least
        self._seconds: dict[int, float] = {}

    def expected(self, kind: Hashable) -> float:
        """The longest time lately, in seconds; UNKNOWN before the first."""
        return max(self._least, self._seconds.get(hash(kind), UNKNOWN))

    def took(self, kind: Hashable, seconds: float) -> None:
        """Note how long a step took. A slow one is forgotten by and by."""
        key = hash(kind)
        faded = 0.9 * self._seconds.pop(key, 0.0)
        self._seconds[key] = max(seconds, faded)  # the newest last
        if len(self._seconds) > REMEMBERED:
            del self._seconds[next(iter(self._seconds))]
