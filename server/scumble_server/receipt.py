"""The receipt: what was asked, what was bound, what was drawn and how long it took. It remakes the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scumble_registry import Version
from scumble_server.admission import Admitted
from scumble_server.base import Base
from scumble_server.conditioning import Conditioned
from scumble_server.methods import METHODS

SCHEMA = 1


def receipt(
    base: Base, admitted: Admitted, conditioned: Conditioned, timings_ms: Mapping[str, float]
) -> dict[str, Any]:
    """Plain JSON. Digests come from the versions that were bound, not from the references that were asked for."""
    settings = admitted.settings
    return {
        "schema": SCHEMA,
        "request": {
            "prompt": settings.prompt,
            "negative_prompt": admitted.request.negative_prompt,
            "base": base.version.ref,
            "scheduler": settings.scheduler,
            "seed": settings.seed,
            "steps": settings.steps,
            "width": settings.width,
            "height": settings.height,
            "num_images": settings.num_images,
            "guidance_scale": settings.guidance_scale,
            "adapters": [spec.model_dump() for spec in admitted.request.adapters],
            "options": admitted.request.options,
        },
        "base": _named(base.version),
        "adapters": [
            {
                **_named(bound.version),
                "ref": bound.spec.ref,
                "kind": bound.version.manifest.kind,
                "weight": bound.spec.weight,
                "text_weight": bound.text_weight,
                **METHODS[bound.kind].describe(bound),
            }
            for bound in conditioned.adapters
        ],
        "dropped": [{"ref": spec.ref, "reason": reason} for spec, reason in (*admitted.dropped, *conditioned.dropped)],
        "truncated": conditioned.cut or None,
        "seeds": settings.seeds,
        "engine": base.executor.describe(),
        "timings_ms": {name: round(value, 3) for name, value in timings_ms.items()},
    }


def _named(version: Version) -> dict[str, Any]:
    return {"name": version.name, "version": version.version, "digest": version.digest, "ref": version.ref}
