"""Other weights than the base's: checkpoints, and of LoRAs what factors cannot say or hold.

A variant is an executor of its own that shares every tensor which is not its own with the base's. Rows of one variant
share their steps; other adapters stack on it as on the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from scumble_build.graphs.layout import RANK_BUCKETS
from scumble_registry import Version
from scumble_registry.compatibility import VaeCompatibility
from scumble_registry.formats.dreambooth import read_changed
from scumble_registry.formats.lora import Module
from scumble_registry.formats.lora.record import Gain
from scumble_registry.formats.safetensors_header import Array
from scumble_server.base import load_tokenizers
from scumble_server.executors.protocol import Executor, Vae
from scumble_server.methods import dreambooth, lora
from scumble_server.methods.context import Context
from scumble_server.methods.lora.deltas import bias_change, change
from scumble_server.request.adapter import Bound


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    executor: Executor
    tokenizers: tuple[CLIPTokenizer, ...]


def on_checkpoint(context: Context, adapters: Sequence[Bound]) -> Context:
    """`context` with the weights of the request's checkpoint, if it has one.

    Raises NotFound, IntegrityError, Refused (the budget for weights is too small for it).
    """
    bound = next((each for each in adapters if each.kind == dreambooth.KIND), None)
    if bound is None:
        return context

    def load() -> _Checkpoint:
        stored, base = context.registry.stored(bound.version), context.registry.stored(context.base.version)
        changed = {
            component: {name: _tensor(values) for name, values in tensors.items()}
            for component, tensors in read_changed(stored, base).items()
        }
        tokenizers = load_tokenizers(stored, context.base.family)
        return _Checkpoint(context.of_base.variant(changed, stored, bound.version), tokenizers)

    key = ("checkpoint", context.base.version.digest, bound.version.digest)
    nbytes = sum(dreambooth.compatibility_of(bound).changed.values()) * context.executor.dtype.itemsize
    loaded = context.held_weights.get(
        key, nbytes, load, of=context.weights_key, drop=lambda checkpoint: checkpoint.executor.close()
    )
    return replace(
        context,
        vae=loaded.executor.vae,
        vae_key=bound.version.digest,
        weights_key=key,
        executor=loaded.executor,
        weights=bound.version.digest,
        drawn_with=bound.version,
        tokenizers=loaded.tokenizers,
    )


def with_vae(context: Context, version: Version | None) -> Context:
    """`context` with the VAE that the request names, if it names one.

    Raises NotFound, IntegrityError, Refused (the budget for weights is too small for it).
    """
    if version is None:
        return context
    about = version.manifest.compatibility
    assert isinstance(about, VaeCompatibility)

    def load() -> Vae:
        return context.executor.load_vae(context.registry.materialise(version))

    key = ("vae", version.digest)
    vae = context.held_weights.get(
        key, about.parameters * (4 if about.float32 else context.executor.dtype.itemsize), load
    )
    return replace(context, vae=vae, vae_key=version.digest)


def to_merge(context: Context, loras: Sequence[Bound]) -> frozenset[str]:
    """The targets at which these LoRAs are merged into copies of the weights: where one of them changes what no factors
    say, and all if together they have more rank columns than the largest bucket, in any graph.
    """
    executor = context.executor
    layouts = *executor.text_layouts, executor.kv_layout, executor.step_layout
    needed = lora.merged_of(loras)
    if any(lora.columns(layout, loras, needed) > RANK_BUCKETS[-1] for layout in layouts):
        return frozenset(target for bound in loras for target in lora.targets_of(bound))
    return needed


def merged(
    context: Context, loras: Sequence[Bound], strengths: Sequence[float], component: str, targets: frozenset[str]
) -> Context:
    """`context` with what LoRAs change at `targets` merged into copies of the weights of one component (`unet`, a text
    encoder).

    Raises Refused with the numbers if the budget for weights does not hold the copies.
    """
    acting = [(bound, strength) for bound, strength in zip(loras, strengths, strict=True) if strength]
    prefix = f"{component}."
    changed = {name for bound, _ in acting for name in lora.targets_of(bound) if name.startswith(prefix)} & targets
    if not changed:
        return context
    weights = (
        "merged",
        context.weights,
        component,
        tuple((lora.identity(context, bound), strength) for bound, strength in acting),
        targets,
    )

    def merge() -> Executor:
        sums: dict[str, Tensor] = {}
        for bound, strength in acting:
            for name, module in lora.record_of(context, bound).items():
                if name in changed:
                    block = 1.0 if bound.blocks is None else bound.blocks.of(name)
                    _add(sums, context.executor, name, module, strength * block)
        values = {parameter.removeprefix(prefix): tensor for parameter, tensor in sums.items()}
        return context.executor.variant({component: values})

    nbytes = sum(context.executor.weight(target).nbytes for target in changed)
    executor = context.held_weights.get(
        weights, nbytes, merge, of=context.weights_key, drop=lambda executor: executor.close()
    )
    return replace(context, executor=executor, weights=weights, weights_key=weights)


def _add(sums: dict[str, Tensor], executor: Executor, target: str, module: Module, strength: float) -> None:
    """To the weight of a layer or norm, and to its bias, if that changes too."""
    name = f"{target}.weight"
    own = executor.parameter(name)
    sums[name] = sums.get(name, own.float()) + strength * change(own, module)
    if module.bias is not None or (isinstance(module, Gain) and module.of_bias is not None):
        name = f"{target}.bias"
        bias = executor.parameter(name)
        added = bias_change(bias, module)
        sums[name] = sums.get(name, bias.float()) + (0 if added is None else strength * added)


def _tensor(values: Array) -> Tensor:
    """torch knows no bfloat16 of numpy's."""
    return torch.from_numpy(np.ascontiguousarray(values).astype(np.float32))
