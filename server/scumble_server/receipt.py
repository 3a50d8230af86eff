"""Makes the receipt of a request from what was settled at admission and what was bound."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scumble.receipt import (
    SCHEMA,
    AskedAdapter,
    AskedRequest,
    BoundAdapter,
    BoundVersion,
    DroppedAdapter,
    PictureInput,
    Receipt,
    TensorInput,
)
from scumble_registry import Version
from scumble_server.admission.admit import Admitted
from scumble_server.conditioning.condition import Conditioned
from scumble_server.methods import method_of
from scumble_server.request.adapter import ResolvedAdapter


def make_receipt(admitted: Admitted, conditioned: Conditioned, timings_ms: Mapping[str, float]) -> Receipt:
    """Digests come from the versions that were bound, not from the references that were asked for."""
    receipt = Receipt(
        schema=SCHEMA,
        request=_asked(admitted),
        base=BoundVersion(**_named(admitted.base.version)),
        adapters=tuple(_bound(adapter, conditioned.layers.get(adapter)) for adapter in conditioned.adapters),
        dropped=tuple(
            DroppedAdapter(ref=spec.ref, reason=reason)
            for spec, reason in (*admitted.dropped, *conditioned.dropped)
            if not any(spec is adapter.spec for adapter in conditioned.adapters)  # a second pass may have a use for it
        ),
        seeds=tuple(admitted.settings.seeds),
        engine=conditioned.conditioning.phases[-1].executor.describe(),
        timings_ms={name: round(value, 3) for name, value in timings_ms.items()},
    )
    if admitted.vae is None:
        return receipt
    return receipt.model_copy(update={"vae": BoundVersion(**_named(admitted.vae))})


def _asked(admitted: Admitted) -> AskedRequest:
    settings, request = admitted.settings, admitted.request
    options = request.options.model_copy(update=dict(settings.scheduler_options))
    return AskedRequest(
        prompt=settings.prompt,
        negative_prompt=request.negative_prompt,
        base=admitted.base.version.ref,
        scheduler=settings.scheduler,
        seed=settings.seed,
        steps=settings.steps,
        width=settings.width,
        height=settings.height,
        num_images=settings.num_images,
        guidance_scale=settings.guidance_scale,
        adapters=tuple(
            AskedAdapter(**spec.model_dump(mode="json", exclude_defaults=True)) for spec in request.adapters
        ),
        options=options.model_dump(mode="json", exclude_defaults=True),
        images={
            name: PictureInput(digest=picture.digest, width=picture.size[0], height=picture.size[1])
            for name, picture in admitted.inputs.pictures.items()
        },
        tensors={name: _described(values) for name, values in admitted.inputs.tensors.items()},
    )


def _bound(adapter: ResolvedAdapter, layers: int | None) -> BoundAdapter:
    return BoundAdapter(
        **_named(adapter.version) | {"ref": adapter.spec.ref},
        kind=adapter.kind,
        weight=adapter.spec.weight,
        text_weight=adapter.text_weight,
        **_layers(layers) | method_of(adapter).describe(adapter),
    )


def _layers(count: int | None) -> dict[str, Any]:
    return {} if count is None else {"layers": count}


def _described(values: NDArray[Any]) -> TensorInput:
    digest = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
    return TensorInput(digest=f"sha256:{digest}", shape=values.shape, dtype=str(values.dtype))


def _named(version: Version) -> dict[str, Any]:
    return {"name": version.name, "version": version.version, "digest": version.digest, "ref": version.ref}
