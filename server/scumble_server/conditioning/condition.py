"""Prompts and adapters of one request → what its rows carry. Runs once per request, beside the loop.

Whatever is made here is kept by all that it was made of (weights, adapters' digests and weights, words), so that the
next request that asks for the same finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from torch import Tensor

from scumble.events import Pixels
from scumble.request import Adapter
from scumble_registry import Registry, Version
from scumble_server.admission.admit import Admitted
from scumble_server.conditioning import original as originals
from scumble_server.conditioning.text import Encoder, together
from scumble_server.conditioning.weights import base_weights, request_weights
from scumble_server.denoise.image import Conditioning
from scumble_server.denoise.original import OriginalLatents
from scumble_server.denoise.phase import Phase
from scumble_server.executors.protocol import Vae
from scumble_server.factors.merging import merge
from scumble_server.factors.request import RequestFactors, bind_for_request, targets_to_merge
from scumble_server.memory.pages import Pools
from scumble_server.memory.residency import Lease, Residency
from scumble_server.methods import Lora, by_method, loras_of, method_of, words_of
from scumble_server.methods.context import Context, Text, read_record
from scumble_server.request.adapter import BoundAdapter


@dataclass(frozen=True, slots=True)
class Conditioned:
    """`adapters` are those that were bound, `dropped` those whose word no prompt has, and why; `maps` are the control
    maps, if they were asked for; times are in milliseconds.
    """

    conditioning: Conditioning
    adapters: tuple[BoundAdapter, ...]
    dropped: tuple[tuple[Adapter, str], ...]
    load_ms: float
    encode_ms: float
    maps: tuple[Pixels, ...]
    originals: tuple[OriginalLatents, ...]
    vae: Vae


class Conditioner:
    """Turns requests into what their rows carry. `condition` is called from one thread.

    `host` keeps records; the leases of a request keep what is made of them.
    """

    def __init__(self, registry: Registry, host: Residency) -> None:
        self._registry = registry
        self._host = host
        self._pools = Pools()

    def condition(self, admitted: Admitted, device: Lease, loaded: Lease) -> Conditioned:
        """`device` pins what the rows carry, and `loaded` the weights that draw them, until the request has ended.

        Raises NotFound, IntegrityError, Refused, OutOfMemory, or what a lease raises.
        """
        weights = base_weights(admitted.base, loaded)
        with self._host.open() as records:
            context = Context(
                base=admitted.base,
                registry=self._registry,
                settings=admitted.settings,
                weights=weights,
                base_weights=weights,
                records=records,
                device=device,
                loaded=loaded,
                rows=admitted.reading.rows,
                pools=self._pools,
            )
            weights = request_weights(context, admitted.adapters, admitted.vae)
            return _condition(replace(context, weights=weights), admitted)

    def prefetch(self, admitted: Admitted) -> None:
        """Bring what a queued request will read into host memory. May be called from any thread."""
        with self._host.open() as records:
            for adapter in admitted.adapters:
                if adapter.version.manifest.record is None:
                    _unpack(self._registry, records, adapter.version)
                else:
                    read_record(self._registry, records, adapter.version, method_of(adapter).read_record)


def _unpack(registry: Registry, records: Lease, version: Version) -> None:
    """Unpack files that are read straight into the device. Once while it is remembered: hashing them takes time."""
    records.get(("unpacked", version.digest), 0, lambda: registry.stored(version))


def _condition(context: Context, admitted: Admitted) -> Conditioned:
    start = monotonic()
    reading = admitted.reading
    words = words_of(admitted.adapters)
    scripts = admitted.scripts
    if context.weights.tokenizers is not admitted.base.tokenizers:  # a checkpoint's own
        scripts = tuple(reading.scripts(context.weights.tokenizers, list(words.values())))
    written = frozenset[int]().union(*(script.found for script in scripts))
    unused = {adapter: word for index, (adapter, word) in enumerate(words.items()) if index not in written}
    loras = loras_of(admitted.adapters)
    to_merge = targets_to_merge(context.executor, loras)
    factors = bind_for_request(context, loras, to_merge)
    of_text = _for_text(context, loras, to_merge)
    bound = monotonic()
    encoder = Encoder(of_text, factors, tuple(words), admitted.request.options.emphasis)
    texts = encoder.encode_all(scripts)
    phases = tuple(
        _phase(
            replace(context, weights=merge(context, loras, planned.weights, "unet", to_merge)),
            planned.weights,
            factors,
            together([texts[index] for index in planned.texts]),
        )
        for planned in admitted.schedule.phases
    )
    encoded = monotonic()
    adapters = tuple(adapter for adapter in admitted.adapters if adapter not in unused)
    fields = " or ".join(field.replace("_", " ") for field in sorted(reading.fields, reverse=True))
    digests = frozenset(adapter.version.digest for adapter in adapters)
    return Conditioned(
        Conditioning(phases, admitted.schedule.phase_of_step, digests, reading.weights),
        adapters,
        tuple((adapter.spec, _why_unused(word.token, fields)) for adapter, word in unused.items()),
        (bound - start) * 1e3,
        (encoded - bound) * 1e3,
        _control_maps(context, admitted),
        tuple(originals.encode(context, original) for original in admitted.originals),
        context.weights.vae,
    )


def _why_unused(token: str, fields: str) -> str:
    return f"its token {token!r} occurs in no prompt ({fields})"


def _for_text(context: Context, loras: Sequence[Lora], targets: frozenset[str]) -> Context:
    """The context with what is merged into the text encoders, whose weights follow no schedule."""
    weights = {lora.adapter: lora.adapter.text_weight for lora in loras}
    for part in context.base.family.texts:
        context = replace(context, weights=merge(context, loras, weights, part.encoder, targets))
    return context


def _phase(context: Context, weights: Mapping[BoundAdapter, float], factors: RequestFactors, text: Text) -> Phase:
    """Make what rows carry in a phase in which the adapters have these weights and `text` is read."""
    parts = {method.kind: method.carry(context, own, text) for method, own in by_method(weights)}
    family = context.base.family
    phase = Phase(
        context.executor,
        _project(context, weights, factors, text),
        factors.of_step(weights),
        {kind: part for kind, part in parts.items() if part is not None},
        pooled=text.pooled if family.sizes else None,
        sizes=context.settings.sizes if family.sizes else None,
    )
    context.executor.prepare(phase.includes, phase.axes | context.latents)
    return phase


def _project(context: Context, weights: Mapping[BoundAdapter, float], factors: RequestFactors, text: Text) -> Tensor:
    """Project the text to keys and values, `(rows, T, K)`."""
    executor, states = context.executor, text.states
    carried = factors.of_kv(weights)
    changes = [change for method, own in by_method(weights) if (change := method.text_change(context, own)) is not None]
    key = (
        "kv",
        context.weights.key,
        text.key,
        carried.key if carried is not None else None,
        tuple(change.key for change in changes),
    )
    nbytes = states.shape[0] * states.shape[1] * executor.kv_layout.full.total_out * states.element_size()

    def project() -> Tensor:
        keys = values = states
        for change in changes:
            keys, values = change.apply(keys, values)
        rows = carried.alone(len(states), executor.device) if carried is not None else None
        return executor.project(keys, rows, values)

    return context.device.get(key, nbytes, project)


def _control_maps(context: Context, admitted: Admitted) -> tuple[Pixels, ...]:
    if not admitted.request.options.return_maps:
        return ()
    maps = (method_of(adapter).control_maps(context, adapter) for adapter in admitted.adapters)
    return tuple(pixels for of_adapter in maps for pixels in of_adapter)
