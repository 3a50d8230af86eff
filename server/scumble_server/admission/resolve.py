"""Resolves what a request names to versions of the registry."""

from __future__ import annotations

from collections.abc import Sequence

from scumble.errors import InvalidRequest, Refused
from scumble.request import Adapter, Options, Request
from scumble_registry import Registry, Version
from scumble_server.admission.inputs import Inputs
from scumble_server.base import Base
from scumble_server.bases import FailedBase
from scumble_server.methods import METHODS
from scumble_server.methods.method import check_fields
from scumble_server.request.adapter import ResolvedAdapter
from scumble_server.request.block_weights import block_weights


def resolve_base(request: Request, bases: Sequence[Base | FailedBase], registry: Registry) -> Base:
    """The first of `bases` is for requests that name none. Raises NotFound; Refused, also if it could not be loaded."""
    if request.base is None:
        return _loaded(bases[0])
    asked = registry.resolve(request.base)
    for base in bases:
        if asked.digest == base.digest:
            return _loaded(base)
    served = ", ".join(base.ref for base in bases if isinstance(base, Base))
    raise Refused(
        f"this server serves {served}, not {asked.ref}; name one of these, or start a server with --base {asked.ref}",
        base=served,
    )


def _loaded(base: Base | FailedBase) -> Base:
    if isinstance(base, FailedBase):
        raise base.refused()
    return base


def resolve_vae(options: Options, base: Base, registry: Registry) -> Version | None:
    """The VAE that a request names instead of its base's. Raises NotFound, Refused, Incompatible."""
    if options.vae is None:
        return None
    version = registry.resolve(options.vae)
    if version.manifest.kind != "vae":
        raise Refused(
            f"options.vae: {version.ref} is a {version.manifest.kind}; name a VAE that was published as one",
            ref=options.vae,
        )
    version.manifest.fits(base.version.manifest)
    return version


def resolve_adapter(spec: Adapter, base: Base, registry: Registry, inputs: Inputs) -> ResolvedAdapter:
    """Bind an adapter to a version that fits the base. Raises InvalidRequest, NotFound, Refused, Incompatible."""
    if spec.start > spec.end:
        raise InvalidRequest(f"{spec.ref}: start {spec.start:g} is after end {spec.end:g}", field="adapters.start")
    version = registry.resolve(spec.ref)
    version.manifest.fits(base.version.manifest)
    method = METHODS.get(version.manifest.kind)
    if method is None:
        raise Refused(
            f"{version.ref} is a {version.manifest.kind}; this server serves {', '.join(METHODS)}", ref=spec.ref
        )
    check_fields(spec, method)
    adapter = ResolvedAdapter(
        spec,
        version,
        block_weights(spec.blocks, base.blocks, base.compatibility.targets),
        tuple(inputs.picture(name, "adapters.images") for name in spec.images if name not in inputs.tensors),
        {name: inputs.tensors[name] for name in spec.images if name in inputs.tensors},
        tuple(inputs.picture(name, "adapters.masks") for name in spec.masks),
    )
    method.check(adapter, base)
    return adapter
