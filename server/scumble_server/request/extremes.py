"""Why a picture may have become NaN: what a request asks for that is far from usual.

Every number of a request has a bound, but many that are within their bounds, or an adapter's own numbers, may still be
more than half precision bears. That is the request's fault, not the server's, and is told as such.
"""

from __future__ import annotations

from collections.abc import Iterator

from scumble.errors import InvalidRequest, Refused, ScumbleError
from scumble.request import Request

USUAL_WEIGHT, USUAL_GUIDANCE = 3.0, 30.0


def not_finite(step: int, request: Request) -> ScumbleError:
    """Return the error of a picture that became NaN or infinite in a step of this request."""
    what = f"the picture became NaN or infinite in step {step}"
    if extreme := next(_extremes(request), None):
        field, told = extreme
        return InvalidRequest(f"{what}; {told}, which is far from usual: take less", field=field)
    if request.adapters:
        refs = ", ".join(adapter.ref for adapter in request.adapters)
        return Refused(f"{what}; one of its adapters ({refs}) does not suit this base or its precision: try without")
    if request.options.grammar != "plain":
        return InvalidRequest(f"{what}; weight the words of the prompt less", field="prompt")
    return ScumbleError(f"{what}; the server's precision may not suit this base")


def _extremes(request: Request) -> Iterator[tuple[str, str]]:
    """Yield fields with what is far from usual in them."""
    for index, adapter in enumerate(request.adapters):
        for name in ("weight", "text_weight"):
            weight = getattr(adapter, name)
            if weight is not None and abs(weight) > USUAL_WEIGHT:
                yield f"adapters.{index}.{name}", f"{adapter.ref} has the {name} {weight:g}"
        blocks = adapter.blocks or ()
        largest = max(map(abs, blocks.values() if isinstance(blocks, dict) else blocks), default=0.0)
        if largest * abs(adapter.weight) > USUAL_WEIGHT:
            yield f"adapters.{index}.blocks", f"{adapter.ref} has a block weight of {largest:g}"
    if request.guidance_scale is not None and request.guidance_scale > USUAL_GUIDANCE:
        yield "guidance_scale", f"guidance_scale is {request.guidance_scale:g}"
