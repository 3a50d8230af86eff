"""Work that may be done ahead."""

from __future__ import annotations

from collections.abc import Callable


class Prefetcher:
    def submit(self, work: Callable[[], None]) -> None:
        """Do it some time, or not at all."""

    def close(self) -> None:
        """Nothing runs after this."""
