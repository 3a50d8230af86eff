"""What a request may ask of a ControlNet, checked at the edge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scumble.errors import InvalidRequest, Refused
from scumble_build.control_maps import Preprocessor, parse
from scumble_registry.compatibility import ControlNetCompatibility
from scumble_server.base import Base
from scumble_server.request.adapter import Bound
from scumble_server.request.settings import Settings

FIELDS = frozenset({"start", "end", "images", "scale", "mode", "control_type", "preprocess"})

CONTROL_TYPES = {
    "openpose": 0,
    "depth": 1,
    "hed": 2,
    "scribble": 2,
    "canny": 3,
    "lineart": 3,
    "mlsd": 3,
    "normal": 4,
    "seg": 5,
    "tile": 6,
    "inpaint": 7,
}
"""The kinds of control of xinsir's union nets, by the place that each has there."""


def check(bound: Bound, base: Base) -> None:
    """Raises InvalidRequest naming the field, or Refused."""
    if not base.changes_graphs and compatibility(bound).form == "lllite":
        raise Refused(
            f"{bound.spec.ref} is a ControlNet-LLLite, which changes the graph, and this server's graphs are fixed; "
            "ask a server that runs with --executor torch",
            ref=bound.spec.ref,
        )
    _check_net(bound)
    _check_pictures(bound)
    _check_mode(bound)
    preprocessor(bound)
    control_types(bound)
    picture_scales(bound)


def check_together(adapters: Sequence[Bound], base: Base, settings: Settings) -> None:
    """Any number of nets may act at once. Raises InvalidRequest for a size that one of them cannot look at."""
    for bound in adapters:
        unit = {"t2i": _unit(bound, base), "lllite": 8 * 2 ** (base.blocks.levels - 1)}.get(
            compatibility(bound).form, 8
        )
        if settings.width % unit or settings.height % unit:
            raise _invalid(
                bound,
                "ref",
                f"takes sizes in steps of {unit}; {settings.width}x{settings.height} is none: change width or height",
            )


def _unit(bound: Bound, base: Base) -> int:
    """SDXL's T2I-Adapters begin at half the latents' size."""
    about = compatibility(bound)
    return about.pixels_per_latent * (2 if len(about.widths) > base.blocks.levels else 1)


def idle(bound: Bound, steps: int) -> str | None:
    return bound.why_never(steps) or (None if any(picture_scales(bound)) else "scale 0 for every picture")


def describe(bound: Bound) -> dict[str, Any]:
    """All that was settled, defaults too."""
    spec = bound.spec
    made = preprocessor(bound)
    return {
        "form": compatibility(bound).form,
        "images": list(spec.images),
        "mode": mode(bound),
        "start": spec.start,
        "end": spec.end,
        **({"control_type": list(spec.control_type)} if spec.control_type else {}),
        **({"preprocess": made.model_dump()} if made is not None else {}),
    }


def compatibility(bound: Bound) -> ControlNetCompatibility:
    found = bound.version.manifest.compatibility
    assert isinstance(found, ControlNetCompatibility)
    return found


def mode(bound: Bound) -> str:
    return bound.spec.mode or "balanced"


def preprocessor(bound: Bound) -> Preprocessor | None:
    """Raises InvalidRequest for one that there is not."""
    return None if bound.spec.preprocess is None else parse(bound.spec.preprocess)


def control_types(bound: Bound) -> tuple[int, ...]:
    """One for each picture of a union net, () for others. Raises InvalidRequest."""
    spec, known = bound.spec, compatibility(bound).control_types
    if not known:
        if spec.control_type:
            raise _invalid(bound, "control_type", "knows one kind of control only; leave control_type out")
        return ()
    served = [name for name, place in CONTROL_TYPES.items() if place < known]
    if len(spec.control_type) != len(bound.pictures):
        raise _invalid(
            bound,
            "control_type",
            f"is a union net: say what each of its {len(bound.pictures)} pictures shows "
            f"({len(spec.control_type)} given); it knows {', '.join(served)}",
        )
    for name in spec.control_type:
        if name not in served:
            raise _invalid(bound, "control_type", f"does not know {name!r}; it knows {', '.join(served)}")
    return tuple(CONTROL_TYPES[name] for name in spec.control_type)


def picture_scales(bound: Bound) -> tuple[float, ...]:
    """A union net's strength for each picture, beside its weight. Raises InvalidRequest."""
    scale, count = bound.spec.scale, len(bound.pictures)
    if scale is None:
        return (1.0,) * count
    numbers = tuple(each for each in scale if isinstance(each, float)) if isinstance(scale, tuple) else ()
    if not compatibility(bound).control_types or not isinstance(scale, tuple) or len(numbers) != len(scale):
        raise _invalid(bound, "scale", "takes scale only as a list of numbers for the pictures of a union net")
    if len(numbers) != count:
        raise _invalid(bound, "scale", f"has {count} pictures, but scale has {len(numbers)} numbers")
    return numbers


def _check_net(bound: Bound) -> None:
    channels = compatibility(bound).conditioning_channels
    if channels not in {1, 3}:
        raise Refused(
            f"{bound.version.ref} reads control pictures of {channels} channels; 3 (RGB) and 1 (grey) are served",
            ref=bound.spec.ref,
        )


def _check_pictures(bound: Bound) -> None:
    if bound.tensors:
        raise _invalid(bound, "images", f"takes pictures, not tensors ({', '.join(bound.tensors)})")
    if not bound.pictures:
        raise _invalid(bound, "images", "needs a picture: send it in the request's images and name it here")
    if len(bound.pictures) > 1 and not compatibility(bound).control_types:
        raise _invalid(
            bound,
            "images",
            f"looks at one picture, not {len(bound.pictures)}; name the adapter once for each of them",
        )


def _check_mode(bound: Bound) -> None:
    if compatibility(bound).form == "lllite" and mode(bound) not in {"balanced", "control"}:
        raise _invalid(bound, "mode", "is an LLLite, which has no residuals to scale; use balanced or control")
    if compatibility(bound).form == "t2i" and mode(bound) == "guess":
        raise _invalid(bound, "mode", "is a T2I-Adapter, which has no guess mode; use balanced, prompt or control")


def _invalid(bound: Bound, field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{bound.spec.ref} {what}", field=f"adapters.{field}")
