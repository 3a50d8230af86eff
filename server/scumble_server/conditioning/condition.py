"""Prompts and adapters of one request → what its rows carry. Runs once per request, beside the loop.

Whatever is made here is kept by all that it was made of (weights, adapters' digests and weights, words), so that the
next request that asks for the same finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

from scumble.events import Pixels
from scumble.request import Adapter
from scumble_registry import Registry, Version
from scumble_server.admission.admit import Admitted
from scumble_server.conditioning import original as originals
from scumble_server.conditioning.phases import make_phase
from scumble_server.conditioning.text import Encoder
from scumble_server.conditioning.weights import request_weights
from scumble_server.denoise.image import Conditioning
from scumble_server.denoise.original import OriginalLatents
from scumble_server.executors.protocol import Vae
from scumble_server.factors.merging import merge_into_text
from scumble_server.factors.request import RequestFactors, bind_for_request, targets_to_merge
from scumble_server.memory.pages import Pools
from scumble_server.memory.residency import Lease, Residency
from scumble_server.methods import control_maps_of, loras_of, method_of, words_of
from scumble_server.methods.context import Context, read_record
from scumble_server.request.adapter import ResolvedAdapter


@dataclass(frozen=True, slots=True)
class Conditioned:
    """`adapters` are those that were bound, `dropped` those whose word no prompt has, and why; `maps` are the control
    maps, if they were asked for; times are in milliseconds.
    """

    conditioning: Conditioning
    adapters: tuple[ResolvedAdapter, ...]
    dropped: tuple[tuple[Adapter, str], ...]
    load_ms: float
    encode_ms: float
    maps: tuple[Pixels, ...]
    originals: tuple[OriginalLatents, ...]
    vae: Vae
    layers: Mapping[ResolvedAdapter, int]
    """How many layers each adapter acts on, where that can be said."""


class Conditioner:
    """Turns requests into what their rows carry. `condition` is called from one thread.

    `host` keeps records; the leases of a request keep what is made of them. Factors lie in `pools`.
    """

    def __init__(self, registry: Registry, host: Residency, pools: Pools) -> None:
        self._registry = registry
        self._host = host
        self._pools = pools

    def condition(self, admitted: Admitted, device: Lease, loaded: Lease) -> Conditioned:
        """`device` pins what the rows carry, and `loaded` the weights that draw them, until the request has ended.

        Raises NotFound, IntegrityError, Refused, OutOfMemory, or what a lease raises.
        """
        base, own = request_weights(admitted.base, admitted.adapters, admitted.vae, self._registry, loaded)
        with self._host.open() as records:
            context = Context(
                base=admitted.base,
                registry=self._registry,
                settings=admitted.settings,
                weights=own,
                base_weights=base,
                records=records,
                device=device,
                loaded=loaded,
                rows=admitted.reading.rows,
                pools=self._pools,
            )
            return _condition(context, admitted)

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
    reading, scripts = admitted.reading, admitted.scripts
    words, loras = words_of(admitted.adapters), loras_of(admitted.adapters)
    maps = control_maps_of(context, admitted.adapters) if admitted.request.options.return_maps else ()
    if context.weights.tokenizers is not admitted.base.tokenizers:  # a checkpoint's own
        scripts = tuple(reading.scripts(context.weights.tokenizers, list(words.values())))
    used = frozenset[int]().union(*(script.used for script in scripts))
    unused = {adapter: word for index, (adapter, word) in enumerate(words.items()) if index not in used}
    to_merge = targets_to_merge(context.executor, loras)
    factors = bind_for_request(context, loras, to_merge)
    of_text = merge_into_text(context, loras, to_merge)
    bound = monotonic()
    encoder = Encoder(of_text, factors, tuple(words), admitted.request.options.emphasis)
    texts = encoder.encode_phases(scripts, [planned.texts for planned in admitted.schedule.phases])
    phases = tuple(
        make_phase(context, planned.weights, factors, to_merge, text)
        for planned, text in zip(admitted.schedule.phases, texts, strict=True)
    )
    encoded = monotonic()
    adapters = tuple(adapter for adapter in admitted.adapters if adapter not in unused)
    fields = " or ".join(field.replace("_", " ") for field in sorted(reading.fields, reverse=True))
    digests = frozenset(adapter.version.digest for adapter in adapters)
    return Conditioned(
        Conditioning(phases, admitted.schedule.phase_of_step, digests, reading.weights),
        adapters,
        tuple(
            (adapter.spec, f"its token {word.token!r} occurs in no prompt ({fields})")
            for adapter, word in unused.items()
        ),
        (bound - start) * 1e3,
        (encoded - bound) * 1e3,
        maps,
        tuple(originals.encode(context, original) for original in admitted.originals),
        context.weights.vae,
        _layers(context, adapters, factors, to_merge),
    )


def _layers(
    context: Context, adapters: Sequence[ResolvedAdapter], factors: RequestFactors, merged: frozenset[str]
) -> dict[ResolvedAdapter, int]:
    """Count what is bound as factors, what is merged into weights, and what other methods act on."""
    bound = factors.layers()
    loras = {lora.adapter: len(bound[lora.adapter] | (merged & {*lora.targets})) for lora in factors.loras}
    others = {adapter: method_of(adapter).layers(context, adapter) for adapter in adapters}
    return loras | {adapter: count for adapter, count in others.items() if count is not None}
