"""The sizes that a server's graphs take, where engines were built for some only: checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scumble.errors import Refused

_AXIS_WORDS = {
    "height": "height of the latents (pixels / 8)",
    "width": "width of the latents (pixels / 8)",
    "tokens": "tokens of the prompt",
    "rank_pages": "rank of the LoRAs together, in pages of 8,",
    "groups": "groups of pictures",
    "image_tokens": "tokens of the pictures",
}
"""A graph's axes in the words of a request."""


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """For each profile of one graph, the sizes that its axes may have, by their names (`export.manifest.Axis`)."""

    graph: str
    profiles: tuple[Mapping[str, range], ...]

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises Refused if no profile takes these sizes together; axes that `sizes` leaves out are not checked."""
        outside = [_outside(profile, sizes) for profile in self.profiles]
        if all(outside):
            nearest = min(outside, key=len)
            raise Refused(
                f"the request is outside what the engine of {self.graph} was built for: "
                f"{'; '.join(nearest)}; ask for less, or build with a wider --profile",
                graph=self.graph,
            )


def _outside(profile: Mapping[str, range], sizes: Mapping[str, int]) -> list[str]:
    """One sentence for each size that a profile does not take."""
    return [
        f"{_AXIS_WORDS.get(name, name)} {size} is not within {profile[name].start} to {profile[name].stop - 1}"
        for name, size in sizes.items()
        if name in profile and size not in profile[name]
    ]


def check_any(limits: Sequence[GraphLimits], sizes: Mapping[str, int]) -> None:
    """Raises Refused if none of these graphs takes the sizes; which of them a request needs is known later."""
    refused: Refused | None = None
    for graph in limits:
        try:
            graph.check(sizes)
        except Refused as error:
            refused = refused or error
        else:
            return
    if refused is not None:
        raise refused
