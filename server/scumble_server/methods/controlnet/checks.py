"""What a request may ask of a ControlNet, checked at the edge."""

from __future__ import annotations

from scumble.errors import InvalidRequest, Refused
from scumble_build.control_maps import Preprocessor, parse
from scumble_registry.compatibility import ControlNetCompatibility
from scumble_server.base import Base
from scumble_server.request.adapter import ResolvedAdapter
from scumble_server.request.settings import Settings

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


def check(adapter: ResolvedAdapter, base: Base) -> None:
    """Raises InvalidRequest naming the field, or Refused."""
    if not base.changes_graphs and compatibility(adapter).form == "lllite":
        raise Refused(
            f"{adapter.spec.ref} is a ControlNet-LLLite, which changes the graph, and this server's graphs are fixed; "
            "ask a server that runs with --executor torch",
            ref=adapter.spec.ref,
        )
    _check_net(adapter)
    _check_pictures(adapter)
    _check_mode(adapter)
    preprocessor(adapter)
    control_types(adapter)
    picture_scales(adapter)


def check_size(adapter: ResolvedAdapter, base: Base, settings: Settings) -> None:
    """Raises InvalidRequest for a size that the adapter cannot look at."""
    unit = _unit(adapter, base)
    if settings.width % unit or settings.height % unit:
        raise _invalid(
            adapter,
            "ref",
            f"takes sizes in steps of {unit}; {settings.width}x{settings.height} is none: change width or height",
        )


def _unit(adapter: ResolvedAdapter, base: Base) -> int:
    """The pixels that a side must be a multiple of."""
    fit = compatibility(adapter)
    if fit.form == "t2i":
        return fit.pixels_per_latent * (2 if len(fit.widths) > base.blocks.levels else 1)  # SDXL's: half the latents
    return 8 * 2 ** (base.blocks.levels - 1) if fit.form == "lllite" else 8


def compatibility(adapter: ResolvedAdapter) -> ControlNetCompatibility:
    compatibility = adapter.version.manifest.compatibility
    assert isinstance(compatibility, ControlNetCompatibility)
    return compatibility


def mode(adapter: ResolvedAdapter) -> str:
    return adapter.spec.mode or "balanced"


def preprocessor(adapter: ResolvedAdapter) -> Preprocessor | None:
    """Raises InvalidRequest for one that there is not."""
    return None if adapter.spec.preprocess is None else parse(adapter.spec.preprocess)


def control_types(adapter: ResolvedAdapter) -> tuple[int, ...]:
    """One for each picture of a union net, () for others. Raises InvalidRequest."""
    spec, known = adapter.spec, compatibility(adapter).control_types
    if not known:
        if spec.control_type:
            raise _invalid(adapter, "control_type", "knows one kind of control only; leave control_type out")
        return ()
    served = [name for name, place in CONTROL_TYPES.items() if place < known]
    if len(spec.control_type) != len(adapter.pictures):
        raise _invalid(
            adapter,
            "control_type",
            f"is a union net: say what each of its {len(adapter.pictures)} pictures shows "
            f"({len(spec.control_type)} given); it knows {', '.join(served)}",
        )
    for name in spec.control_type:
        if name not in served:
            raise _invalid(adapter, "control_type", f"does not know {name!r}; it knows {', '.join(served)}")
    return tuple(CONTROL_TYPES[name] for name in spec.control_type)


def picture_scales(adapter: ResolvedAdapter) -> tuple[float, ...]:
    """A union net's weight for each picture, beside its own weight. Raises InvalidRequest."""
    scale, count = adapter.spec.scale, len(adapter.pictures)
    if scale is None:
        return (1.0,) * count
    numbers = tuple(each for each in scale if isinstance(each, float)) if isinstance(scale, tuple) else ()
    if not compatibility(adapter).control_types or not isinstance(scale, tuple) or len(numbers) != len(scale):
        raise _invalid(adapter, "scale", "takes scale only as a list of numbers for the pictures of a union net")
    if len(numbers) != count:
        raise _invalid(adapter, "scale", f"has {count} pictures, but scale has {len(numbers)} numbers")
    return numbers


def _check_net(adapter: ResolvedAdapter) -> None:
    channels = compatibility(adapter).conditioning_channels
    if channels not in {1, 3}:
        raise Refused(
            f"{adapter.version.ref} reads control pictures of {channels} channels; 3 (RGB) and 1 (grey) are served",
            ref=adapter.spec.ref,
        )


def _check_pictures(adapter: ResolvedAdapter) -> None:
    if adapter.tensors:
        raise _invalid(adapter, "images", f"takes pictures, not tensors ({', '.join(adapter.tensors)})")
    if not adapter.pictures:
        raise _invalid(adapter, "images", "needs a picture: send it in the request's images and name it here")
    if len(adapter.pictures) > 1 and not compatibility(adapter).control_types:
        raise _invalid(
            adapter,
            "images",
            f"looks at one picture, not {len(adapter.pictures)}; name the adapter once for each of them",
        )


def _check_mode(adapter: ResolvedAdapter) -> None:
    if compatibility(adapter).form == "lllite" and mode(adapter) not in {"balanced", "control"}:
        raise _invalid(adapter, "mode", "is an LLLite, which has no residuals to scale; use balanced or control")
    if compatibility(adapter).form == "t2i" and mode(adapter) == "guess":
        raise _invalid(adapter, "mode", "is a T2I-Adapter, which has no guess mode; use balanced, prompt or control")


def _invalid(adapter: ResolvedAdapter, field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{adapter.spec.ref} {what}", field=f"adapters.{field}")
