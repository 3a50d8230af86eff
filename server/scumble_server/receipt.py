"""The receipt: what was asked, what was bound, what was drawn and how long it took. It remakes the picture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scumble_registry import Version
from scumble_server.admission.admit import Admitted
from scumble_server.conditioning.condition import Conditioned
from scumble_server.methods import method_of

SCHEMA = 1


def receipt(admitted: Admitted, conditioned: Conditioned, timings_ms: Mapping[str, float]) -> dict[str, Any]:
    """Plain JSON. Digests come from the versions that were bound, not from the references that were asked for."""
    settings, base = admitted.settings, admitted.base
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
            "adapters": [spec.model_dump(mode="json", exclude_defaults=True) for spec in admitted.request.adapters],
            "options": admitted.request.options.model_copy(update=dict(settings.scheduler_options)).model_dump(
                exclude_defaults=True
            ),
            "images": {
                name: {"digest": picture.digest, "width": picture.size[0], "height": picture.size[1]}
                for name, picture in admitted.inputs.pictures.items()
            },
            "tensors": {name: _described(values) for name, values in admitted.inputs.tensors.items()},
        },
        "base": _named(base.version),
        **({"vae": _named(admitted.vae)} if admitted.vae is not None else {}),
        "adapters": [
            {
                **_named(adapter.version),
                "ref": adapter.spec.ref,
                "kind": adapter.kind,
                "weight": adapter.spec.weight,
                "text_weight": adapter.text_weight,
                **method_of(adapter).describe(adapter),
            }
            for adapter in conditioned.adapters
        ],
        "dropped": [
            {"ref": spec.ref, "reason": reason}
            for spec, reason in (*admitted.dropped, *conditioned.dropped)
            if not any(spec is adapter.spec for adapter in conditioned.adapters)  # a second pass may have a use for it
        ],
        "seeds": settings.seeds,
        "engine": conditioned.conditioning.phases[-1].executor.describe(),
        "timings_ms": {name: round(value, 3) for name, value in timings_ms.items()},
    }


def _described(values: NDArray[Any]) -> dict[str, Any]:
    """`digest` covers the bytes as safetensors holds them: little-endian, row by row."""
    digest = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
    return {"digest": f"sha256:{digest}", "shape": list(values.shape), "dtype": str(values.dtype)}


def _named(version: Version) -> dict[str, Any]:
    return {"name": version.name, "version": version.version, "digest": version.digest, "ref": version.ref}
