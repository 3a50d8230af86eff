"""The weights that a request is drawn with: its base's, a checkpoint's, another VAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scumble_build.graphs.loading import loading
from scumble_registry import Registry, Version
from scumble_registry.compatibility import VaeCompatibility
from scumble_server.base import Base
from scumble_server.executors.protocol import Vae
from scumble_server.memory.residency import Lease
from scumble_server.methods import method_of
from scumble_server.methods.context import Weights
from scumble_server.request.adapter import ResolvedAdapter


def request_weights(
    base: Base, adapters: Sequence[ResolvedAdapter], vae: Version | None, registry: Registry, loaded: Lease
) -> tuple[Weights, Weights]:
    """The base's own weights; and those that draw the request: the base's, or those that an adapter brings, with the
    VAE that the request names. `loaded` holds them.

    Raises NotFound, IntegrityError, Refused (the budget), Unavailable.
    """
    executor = base.executor(loaded)
    own = Weights(base.version, base.key, executor, base.tokenizers, executor.vae, base.version.digest)
    weights = own
    for adapter in adapters:
        weights = method_of(adapter).weights(adapter, own, base, registry, loaded) or weights
    return own, weights if vae is None else _with_vae(weights, vae, registry, loaded)


def _with_vae(weights: Weights, version: Version, registry: Registry, loaded: Lease) -> Weights:
    compatibility = version.manifest.compatibility
    assert isinstance(compatibility, VaeCompatibility)

    def load() -> Vae:
        with loading(version.ref, version.digest):
            return weights.executor.load_vae(registry.materialise(version))

    key = ("vae", version.digest)
    itemsize = 4 if compatibility.float32 else weights.executor.dtype.itemsize
    return replace(weights, vae=loaded.get(key, compatibility.parameters * itemsize, load), vae_key=version.digest)
