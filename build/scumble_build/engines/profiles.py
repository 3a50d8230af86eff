"""The shapes that an engine takes: ranges of a graph's axes, each with the size that the engine is tuned for.

A graph's manifest has a range for each axis, which makes one profile. A file can narrow it, or define several: an
engine tuned for the usual sizes is faster there and takes less memory.

    [[profile]]
    rows = [1, 8, 16]            # least, usual, most
    height = [64, 64, 96]        # of the latents: 512 to 768 pixels
    width = [64, 64, 96]

    [[profile]]
    graphs = ["unet.bare"]       # or patterns such as vae_*; default: every graph
    rows = 2                     # exactly 2
    height = 128
    width = 128

Axes that it leaves out keep the manifest's range. Without a file, engines are built for the `usual` sizes of the base:
the whole ranges would take tens of GiB of scratch memory.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from scumble.errors import InvalidRequest, NotFound
from scumble_build.export.manifest import GraphManifest

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""For each input, its least, usual and largest shape."""


@dataclass(frozen=True, slots=True)
class Range:
    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.usual <= self.most:
            raise InvalidRequest(
                f"a range is least ≤ usual ≤ most, not {self.least}, {self.usual}, {self.most}", field="profile"
            )


@dataclass(frozen=True, slots=True)
class Profile:
    """Ranges of the narrowed `axes`, and names or patterns of the `graphs` that it is for (None: all)."""

    axes: Mapping[str, Range]
    graphs: frozenset[str] | None = None

    def is_for(self, graph: str) -> bool:
        return self.graphs is None or any(fnmatchcase(graph, pattern) for pattern in self.graphs)

    def ranges(self, manifest: GraphManifest) -> dict[str, Range]:
        """Return the range of every independent axis of a graph. Raises InvalidRequest for sizes outside the graph's
        range.
        """
        own = {name: Range(axis.min, axis.opt, axis.max) for name, axis in manifest.axes.items() if axis.of is None}
        own.pop("positions", None)  # follows from height and width
        return own | {name: axis for name, axis in self.axes.items() if name in own}

    def shapes(self, manifest: GraphManifest) -> Shapes:
        ranges = self.ranges(manifest)
        ends = [
            manifest.shapes({name: getattr(axis, end) for name, axis in ranges.items()})
            for end in ("least", "usual", "most")
        ]
        return {port.name: (ends[0][port.name], ends[1][port.name], ends[2][port.name]) for port in manifest.inputs}


WHOLE = Profile({})
"""The full range of a graph's manifest."""


def usual(side: int, scale: int = 8) -> tuple[Profile, ...]:
    """Return profiles for a base that draws latents of `side`, `scale` pixels to each: half to one and a half of it, up
    to 8 guided images, with LoRAs of rank 128 each. For 64 and 128 they are those of `deploy/profiles/`.
    """
    sides, pixels = (Range(at // 2, at, at * 3 // 2) for at in (side, side * scale))
    is_large = side * scale >= 1024
    small_pages, rest_pages = (200, 200) if is_large else (512, 256)
    drawing = {
        "rows": Range(1, 4 if is_large else 8, 16),
        "tokens": Range(77, 77, 231),
        "height": sides,
        "width": sides,
        "resident": Range(1, 64, small_pages),
        "resident_rest": Range(1, 64, rest_pages),
        "rank_pages": Range(1, 4, 16),
        "groups": Range(1, 1, 4),
        "image_tokens": Range(1, 16, 64),
    }
    pictures = {
        "rows": Range(1, 1, 1 if is_large else 4),
        "height": sides,
        "width": sides,
        "pixel_height": pixels,
        "pixel_width": pixels,
    }
    of_nets = ("controlnet", "controlnet_kv", "controlnet_condition")
    return (
        Profile(drawing, frozenset(("text_encoder*", "kv_projection", "unet.*", *of_nets))),
        Profile(pictures, frozenset(("vae_*", "controlnet_hint"))),
    )


def of(manifest: GraphManifest, wanted: Iterable[Profile]) -> tuple[Profile, ...]:
    """Return the profiles that are for this graph, or WHOLE if none is."""
    return tuple(profile for profile in wanted if profile.is_for(manifest.graph)) or (WHOLE,)


def described(manifest: GraphManifest, profiles: Iterable[Profile]) -> list[dict[str, list[int]]]:
    """Return profiles as an engine's key has them: every range, written out."""
    return [
        {name: [axis.least, axis.usual, axis.most] for name, axis in sorted(profile.ranges(manifest).items())}
        for profile in profiles
    ]


def read(file: Path) -> tuple[Profile, ...]:
    """Read profiles from a TOML file. Raises NotFound, or InvalidRequest naming what is wrong."""
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound(f"--profile: {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file} is not TOML: {error}", field="profile") from error
    entries = data.get("profile")
    if set(data) != {"profile"} or not isinstance(entries, list) or not entries:
        raise InvalidRequest(
            f"{file} must have [[profile]] tables and nothing else; docs/gpu.md has an example", field="profile"
        )
    return tuple(_profile(entry, file) for entry in entries)


OF_NETS = frozenset(("controlnet", "controlnet_kv", "controlnet_hint", "controlnet_condition"))
"""Graphs of ControlNets: one file may be for a base and its nets."""


def check_names(wanted: Iterable[Profile], manifests: Iterable[GraphManifest]) -> None:
    """Check names in profiles. Raises InvalidRequest for an unknown axis or graph, which would have no effect."""
    manifests = tuple(manifests)
    axes = {name for manifest in manifests for name, axis in manifest.axes.items() if axis.of is None}
    graphs = {manifest.graph for manifest in manifests} | OF_NETS
    for profile in wanted:
        unmatched = {
            pattern for pattern in profile.graphs or () if not any(fnmatchcase(name, pattern) for name in graphs)
        }
        for what, unknown, known in (("axis", set(profile.axes) - axes, axes), ("graph", unmatched, graphs)):
            if unknown:
                raise InvalidRequest(
                    f"the profile names the {what} {min(unknown)}, which no graph here has; there are "
                    f"{', '.join(sorted(known))}",
                    field="profile",
                )


def _profile(entry: Mapping[str, Any], file: Path) -> Profile:
    graphs = entry.get("graphs")
    if graphs is not None and not (isinstance(graphs, list) and all(isinstance(name, str) for name in graphs)):
        raise InvalidRequest(f"{file}: graphs must be a list of names", field="profile")
    axes = {name: _range(name, value, file) for name, value in entry.items() if name != "graphs"}
    return Profile(axes, None if graphs is None else frozenset(graphs))


def _range(name: str, value: Any, file: Path) -> Range:
    numbers = value if isinstance(value, list) else [value] * 3
    if len(numbers) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise InvalidRequest(f"{file}: {name} must be a number, or [least, usual, most]", field="profile")
    return Range(*numbers)
