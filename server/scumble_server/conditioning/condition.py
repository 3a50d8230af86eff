"""Prompts and adapters of one request → what its rows carry. Runs once per request, beside the loop.

Whatever is made here is kept by all that it was made of (weights, adapters' digests, strengths, words), so that the
next request that asks for the same finds it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from time import monotonic

import torch
from torch import Tensor

from scumble.events import Pixels
from scumble.request import Adapter
from scumble_build.graphs.layout import Layout
from scumble_registry import Registry, Version
from scumble_server.admission.admit import Admitted
from scumble_server.conditioning import original as originals
from scumble_server.conditioning.text import Encoder, together
from scumble_server.conditioning.weights import merged, on_checkpoint, to_merge, with_vae
from scumble_server.denoise.begin import Beginning
from scumble_server.denoise.image import Conditioning
from scumble_server.denoise.phase import BoundSet, Phase, hold, let_go
from scumble_server.denoise.stacking import brings, factors_of, sizes_of
from scumble_server.executors.device import uploads
from scumble_server.executors.protocol import Vae
from scumble_server.memory.pages import PageSet, Pools
from scumble_server.memory.residency import Lease, Residency
from scumble_server.methods import METHODS, controlnet, hypernetwork, ip_adapter, lora, textual_inversion
from scumble_server.methods.context import Context, Text, read_record
from scumble_server.request.adapter import Bound


@dataclass(frozen=True, slots=True)
class Conditioned:
    """`adapters` are those that were bound, `dropped` those whose prompts have no use for them, and why; `maps` are the
    control maps, if they were asked for; times are in milliseconds.
    """

    conditioning: Conditioning
    adapters: tuple[Bound, ...]
    dropped: tuple[tuple[Adapter, str], ...]
    load_ms: float
    encode_ms: float
    maps: tuple[Pixels, ...]
    beginnings: tuple[Beginning, ...]
    vae: Vae


@dataclass(frozen=True, slots=True)
class _Factors:
    """The LoRAs of a request, laid out for each graph that takes factors. `key` says what they were made of."""

    key: Hashable
    texts: tuple[BoundSet | None, ...]
    kv: BoundSet | None
    step: BoundSet | None


class Conditioner:
    """Turns requests into what their rows carry; called from one thread.

    `host` keeps records, `device` what is made of them.
    """

    def __init__(self, registry: Registry, host: Residency) -> None:
        self._registry = registry
        self._host = host
        self._pools = Pools()

    def condition(self, admitted: Admitted, device: Lease, weights: Lease) -> Conditioned:
        """`device` pins what the rows carry, and `weights` what they are drawn with, until the request has ended."""
        base = admitted.base
        executor = base.executor(weights)
        with self._host.open() as records:
            context = Context(
                base=base,
                registry=self._registry,
                settings=admitted.settings,
                of_base=executor,
                executor=executor,
                weights=base.version.digest,
                drawn_with=base.version,
                vae=executor.vae,
                vae_key=base.version.digest,
                tokenizers=base.tokenizers,
                records=records,
                device=device,
                held_weights=weights,
                weights_key=base.key,
                rows=admitted.reading.rows,
                pools=self._pools,
            )
            drawn_with = on_checkpoint(context, admitted.adapters)
            return _condition(with_vae(drawn_with, admitted.vae), admitted)

    def prefetch(self, admitted: Admitted) -> None:
        """Bring what a queued request will read into host memory. May be called from any thread."""
        with self._host.open() as records:
            for bound in admitted.adapters:
                if bound.version.manifest.record is None:
                    _unpack(self._registry, records, bound.version)
                else:
                    read_record(self._registry, records, bound, METHODS[bound.kind].read_record)


def _unpack(registry: Registry, records: Lease, version: Version) -> None:
    """For files that are read straight into the device. Once while it is remembered: hashing them takes time."""
    records.get(("unpacked", version.digest), 0, lambda: registry.stored(version))


def _condition(context: Context, admitted: Admitted) -> Conditioned:
    start = monotonic()
    loras = [bound for bound in admitted.adapters if lora.part_of(bound) is not None]
    embeddings = _of_kind(textual_inversion.KIND, admitted.adapters)
    reading, options = admitted.reading, admitted.request.options
    scripts = reading.scripts(context.tokenizers, textual_inversion.names(embeddings))
    found = frozenset[int]().union(*(script.found for script in scripts))
    unused = [bound for index, bound in enumerate(embeddings) if index not in found]
    in_weights = to_merge(context, loras)
    factors = _factors(context, loras, in_weights)
    # What factors cannot say or hold is merged into copies of the weights instead: for the text once, for the UNet in
    # every phase.
    of_text = context
    strengths = tuple(each.text_weight for each in loras)
    for part in context.base.family.texts:
        of_text = merged(of_text, loras, strengths, part.encoder, in_weights)
    loaded = monotonic()
    of_loras = tuple(lora.row_factors(of_encoder, strengths) for of_encoder in factors.texts)
    encoder = Encoder(of_text, of_loras, (factors.key, strengths), dict(enumerate(embeddings)), options.emphasis)
    texts = encoder.encode_all(scripts)
    groups = ip_adapter.groups(context, _of_kind(ip_adapter.KIND, admitted.adapters))
    nets = _of_kind(controlnet.KIND, admitted.adapters)
    controls = controlnet.prepare(context, nets)
    phases = tuple(
        _phase(
            merged(context, loras, _of_loras(stage.weights, admitted.adapters), "unet", in_weights),
            admitted.adapters,
            stage.weights,
            factors,
            together([texts[index] for index in stage.texts]),
            groups,
            controls,
        )
        for stage in admitted.schedule.stages
    )
    encoded = monotonic()
    adapters = tuple(bound for bound in admitted.adapters if not any(bound is each for each in unused))
    return Conditioned(
        Conditioning(
            phases,
            admitted.schedule.phase_of_step,
            frozenset(each.version.digest for each in adapters),
            reading.weights,
        ),
        adapters,
        tuple((each.spec, textual_inversion.why_unused(each, reading.fields)) for each in unused),
        (loaded - start) * 1e3,
        (encoded - loaded) * 1e3,
        controlnet.maps(context, nets) if options.return_maps else (),
        tuple(originals.prepare(context, original) for original in admitted.originals),
        context.vae,
    )


def _of_loras(weights: Sequence[float], adapters: Sequence[Bound]) -> tuple[float, ...]:
    """Of one phase's weights for all adapters, those of the LoRAs."""
    paired = zip(weights, adapters, strict=True)
    return tuple(weight for weight, bound in paired if lora.part_of(bound) is not None)


def _factors(context: Context, loras: Sequence[Bound], without: frozenset[str]) -> _Factors:
    """Of all targets but those `without`."""
    executor = context.executor
    return _Factors(
        (tuple(lora.identity(context, each) for each in loras), without),
        tuple(_bind(context, f"text {i}", layout, loras, without) for i, layout in enumerate(executor.text_layouts)),
        _bind(context, "kv", executor.kv_layout, loras, without),
        _bind(context, "step", executor.step_layout, loras, without, pooled=True),
    )


def _bind(
    context: Context,
    graph: str,
    layout: Layout,
    loras: Sequence[Bound],
    without: frozenset[str],
    *,
    pooled: bool = False,
) -> BoundSet | None:
    """`pooled`: in the pools that batches read, or in memory of its own."""
    executor = context.executor

    def bind() -> BoundSet | None:
        pieces = [lora.Piece(lora.record_of(context, each), each.blocks) for each in loras]
        bound = lora.bind(layout, pieces, executor.weight, without)
        if bound is None:
            return None
        if not pooled:
            sent = uploads(executor.device).send(*bound.small.holder.tensors, dtype=executor.dtype)
            return replace(bound, small=PageSet.own(*sent))
        device, dtype = torch.device(executor.device), executor.dtype
        parts = zip((layout.small, layout.rest), executor.most_pages, strict=True)
        return hold(bound, [context.pools.of(extent, device, dtype, most) for extent, most in parts])

    of_weights = context.weights if any(map(lora.depends_on_weights, loras)) else None
    identities = (lora.identity(context, each) for each in loras)
    key = ("factors", graph, layout.digest, executor.dtype, of_weights, without, *identities)
    nbytes = lora.bound_bytes(layout, loras, executor.dtype.itemsize, without)
    return context.device.get(key, nbytes, bind, drop=let_go if pooled else None)


def _phase(
    context: Context,
    adapters: Sequence[Bound],
    weights: Sequence[float],
    factors: _Factors,
    text: Text,
    groups: ip_adapter.Groups | None,
    controls: Sequence[controlnet.Control],
) -> Phase:
    """`weights` has one for each of `adapters`."""
    paired = list(zip(weights, adapters, strict=True))
    of_loras = _of_loras(weights, adapters)
    of_nets = [weight for weight, bound in paired if bound.kind == controlnet.KIND]
    chain = hypernetwork.chain(context, adapters, weights)
    phase = Phase(
        context.executor,
        _project(context, text, factors, of_loras, chain),
        lora.row_factors(factors.step, of_loras),
        ip_adapter.row_images(
            groups, [weight for weight, bound in paired if bound.kind == ip_adapter.KIND], context.rows
        ),
        nets=controlnet.row_nets(context, controls, of_nets, text),
        features=controlnet.features(context, controls, of_nets),
        contexts=hypernetwork.row_contexts(chain, context.base),
        lites=controlnet.row_lites(context, controls, of_nets),
        pooled=text.pooled if context.base.family.sizes else None,
        sizes=context.settings.sizes if context.base.family.sizes else None,
    )
    context.executor.prepare(brings(phase), sizes_of(phase) | context.latents)
    return phase


def _project(
    context: Context,
    text: Text,
    factors: _Factors,
    weights: tuple[float, ...],
    chain: Sequence[hypernetwork.Link],
) -> Tensor:
    """Keys and values of the text, `(rows, T, K)`."""
    executor, states = context.executor, text.states
    carried = lora.row_factors(factors.kv, weights)
    links = hypernetwork.on_text(chain, states.shape[-1])
    key = (
        "kv",
        context.weights,
        text.key,
        (factors.key, weights) if carried is not None else None,
        tuple((link.digest, link.strength) for link in links),
    )
    nbytes = states.shape[0] * states.shape[1] * executor.kv_layout.full.total_out * states.element_size()

    def project() -> Tensor:
        of_keys, of_values = hypernetwork.change(links, states)
        return executor.project(of_keys, factors_of(carried, len(states), executor.device), of_values)

    return context.device.get(key, nbytes, project)


def _of_kind(kind: str, adapters: Sequence[Bound]) -> list[Bound]:
    return [bound for bound in adapters if bound.kind == kind]
