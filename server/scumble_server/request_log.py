"""One line of the server's log for each request that ended: what was asked for, what it took, and how it ended.

Prompts are left out unless asked for, and with them messages, which may quote them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from scumble.events import Done, Failed
from scumble.receipt import pin
from scumble_server.admission.admit import Admitted

log = logging.getLogger("scumble.requests")


def write(
    request_id: str, admitted: Admitted | None, ended: Done | Failed, milliseconds: float, *, prompts: bool
) -> None:
    """Write the line. `admitted` is None for a request that was refused at the edge."""
    asked = {} if admitted is None else _asked(admitted)
    if prompts:
        asked |= _texts(admitted, ended)
    log.info("request", extra={"fields": {"id": request_id, **_ending(ended), **_times(ended, milliseconds), **asked}})


def _ending(ended: Done | Failed) -> dict[str, Any]:
    if isinstance(ended, Done):
        return {"outcome": "done"}
    field = ended.error.fields.get("field")
    return {"outcome": ended.error.code, **({"field": field} if field else {})}


def _times(ended: Done | Failed, milliseconds: float) -> dict[str, float]:
    """In milliseconds, under the names of a receipt's `timings_ms`."""
    times: Mapping[str, float] = ended.receipt.timings_ms if isinstance(ended, Done) else {"total": milliseconds}
    return {f"{name}_ms": round(value, 1) for name, value in times.items()}


def _asked(admitted: Admitted) -> dict[str, Any]:
    """Everything by digest, in the form that a request takes."""
    settings, base = admitted.settings, admitted.base.version
    return {
        "base": pin(base.ref, base.digest),
        "adapters": [
            f"{pin(adapter.spec.ref, adapter.version.digest)}:{adapter.spec.weight:g}" for adapter in admitted.adapters
        ],
        "scheduler": settings.scheduler,
        "steps": settings.steps,
        "size": f"{settings.width}x{settings.height}",
        "images": settings.num_images,
        "seed": settings.seed,
    }


def _texts(admitted: Admitted | None, ended: Done | Failed) -> dict[str, Any]:
    said = {"message": ended.error.message} if isinstance(ended, Failed) else {}
    if admitted is None:
        return said
    return {**said, "prompt": admitted.settings.prompt, "negative_prompt": admitted.settings.negative_prompt}
