"""The sizes that a server's graphs accept, which engines restrict. They are checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scumble.errors import Refused

_AXIS_WORDS = {
    "height": "height of the latents (pixels / 8)",
    "width": "width of the latents (pixels / 8)",
    "tokens": "tokens of the prompt",
    "rank_pages": "total rank of the LoRAs, in pages of 8,",
    "groups": "groups of pictures",
    "image_tokens": "tokens of the pictures",
}
"""A graph's axes, as messages name them."""


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """For each profile of one graph, the sizes of its axes, by name (`export.manifest.Axis`)."""

    graph: str
    profiles: tuple[Mapping[str, range], ...]

    def least(self, axis: str) -> int:
        """Return the smallest size of an axis that any profile accepts; 1 if none has the axis."""
        return min((profile[axis].start for profile in self.profiles if axis in profile), default=1)

    def most(self, axis: str) -> int | None:
        """Return the largest size of an axis that any profile accepts; None if none has the axis."""
        return max((profile[axis].stop - 1 for profile in self.profiles if axis in profile), default=None)

    def check(self, sizes: Mapping[str, int]) -> None:
        """Check sizes of axes; those not in `sizes` are not checked. Raises Refused if no profile
        accepts all of them.
        """
        outside = [_outside(profile, sizes) for profile in self.profiles]
        if all(outside):
            nearest = min(outside, key=len)
            raise Refused(
                f"the request is outside what the engine of {self.graph} was built for: "
                f"{'; '.join(nearest)}; reduce it, or build with a wider --profile",
                graph=self.graph,
            )


def _outside(profile: Mapping[str, range], sizes: Mapping[str, int]) -> list[str]:
    """Return a message for each size that a profile does not accept."""
    return [
        f"{_AXIS_WORDS.get(name, name)} {size} is not within {profile[name].start} to {profile[name].stop - 1}"
        for name, size in sizes.items()
        if name in profile and size not in profile[name]
    ]


def check_any(limits: Sequence[GraphLimits], sizes: Mapping[str, int]) -> None:
    """Check that one of these graphs accepts the sizes. Raises Refused if none does. Which graph a request needs is
    only known later.
    """
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
