"""The weights that a request is drawn with: its base's, a checkpoint's, another VAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scumble_registry import Version
from scumble_registry.compatibility import VaeCompatibility
from scumble_server.base import Base
from scumble_server.executors.protocol import Vae
from scumble_server.memory.residency import Lease
from scumble_server.methods import method_of
from scumble_server.methods.context import Context, Weights
from scumble_server.request.adapter import BoundAdapter


def base_weights(base: Base, loaded: Lease) -> Weights:
    """The base's own, held by this lease. Raises Refused (the budget), Unavailable."""
    executor = base.executor(loaded)
    return Weights(base.version, base.key, executor, base.tokenizers, executor.vae, base.version.digest)


def request_weights(context: Context, adapters: Sequence[BoundAdapter], vae: Version | None) -> Weights:
    """The base's weights, or those that an adapter brings, with the VAE that the request names.

    Raises NotFound, IntegrityError, Refused (the budget).
    """
    weights = context.weights
    for adapter in adapters:
        weights = method_of(adapter).weights(context, adapter) or weights
    return weights if vae is None else _with_vae(replace(context, weights=weights), vae)


def _with_vae(context: Context, version: Version) -> Weights:
    compatibility = version.manifest.compatibility
    assert isinstance(compatibility, VaeCompatibility)

    def load() -> Vae:
        return context.executor.load_vae(context.registry.materialise(version))

    key = ("vae", version.digest)
    itemsize = 4 if compatibility.float32 else context.executor.dtype.itemsize
    vae = context.loaded.get(key, compatibility.parameters * itemsize, load)
    return replace(context.weights, vae=vae, vae_key=version.digest)
