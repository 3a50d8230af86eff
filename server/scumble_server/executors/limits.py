"""Which sizes a server's graphs take, where they were built for some: asked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scumble.errors import Refused

_NAMES = {
    "height": "height of the latents (pixels / 8)",
    "width": "width of the latents (pixels / 8)",
    "tokens": "tokens of the prompt",
    "rank_pages": "rank of the LoRAs together, in pages of 8,",
    "groups": "groups of pictures",
    "image_tokens": "tokens of the pictures",
}
"""Of axes, as one who asks for a picture knows them."""


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """Of one graph: for each of its profiles, the sizes of its axes (`export.manifest.Axis`)."""

    graph: str
    profiles: tuple[Mapping[str, range], ...]

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises Refused if no profile takes these together, whatever the graph's other sizes are."""
        outside = [self._outside(profile, sizes) for profile in self.profiles]
        if all(outside):
            nearest = min(outside, key=len)
            raise Refused(
                f"the request is outside what the engine of {self.graph} was built for: "
                f"{'; '.join(nearest)}; ask for less, or build with a wider --profile",
                graph=self.graph,
            )

    def _outside(self, profile: Mapping[str, range], sizes: Mapping[str, int]) -> list[str]:
        """What does not fit, in words."""
        return [
            f"{_NAMES.get(name, name)} {size} is not within {profile[name].start} to {profile[name].stop - 1}"
            for name, size in sizes.items()
            if name in profile and size not in profile[name]
        ]


def check_any(limits: Sequence[GraphLimits], sizes: Mapping[str, int]) -> None:
    """Raises Refused if none of these graphs takes the sizes; which of them a request needs is known later."""
    refused: Refused | None = None
    for each in limits:
        try:
            each.check(sizes)
        except Refused as error:
            refused = refused or error
        else:
            return
    if refused is not None:
        raise refused
