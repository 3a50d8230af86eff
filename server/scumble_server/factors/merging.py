"""Merges LoRAs into copies of weights: what factors cannot express or hold.

A merged set of weights is an executor of its own, which shares every tensor that it does not change with the one that
it was made of. Rows with the same merged weights share their steps; other adapters stack on them as on the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from scumble_registry.formats.lora import Module
from scumble_registry.formats.lora.record import Gain
from scumble_server.executors.protocol import Executor
from scumble_server.factors.deltas import bias_change, change
from scumble_server.methods.context import Context, Weights
from scumble_server.methods.method import Lora
from scumble_server.request.adapter import ResolvedAdapter


def merge(
    context: Context,
    loras: Sequence[Lora],
    weights: Mapping[ResolvedAdapter, float],
    component: str,
    targets: frozenset[str],
) -> Weights:
    """Merge what LoRAs change at `targets`, at their weights, into copies of one component (`unet`, a text encoder).

    Raises Refused with the numbers if the budget for weights does not hold the copies.
    """
    acting = [lora for lora in loras if weights[lora.adapter]]
    prefix = f"{component}."
    changed = {name for lora in acting for name in lora.targets if name.startswith(prefix)} & targets
    if not changed:
        return context.weights
    identities = tuple((lora.identity(context), weights[lora.adapter]) for lora in acting)
    key = ("merged", context.weights.key, component, identities, targets)

    def make() -> Executor:
        sums: dict[str, Tensor] = {}
        for lora in acting:
            blocks = lora.adapter.blocks
            for name, module in lora.read(context).items():
                if name in changed:
                    weight = weights[lora.adapter] * (1.0 if blocks is None else blocks.of(name))
                    _add(sums, context.executor, name, module, weight)
        parameters = {parameter.removeprefix(prefix): tensor for parameter, tensor in sums.items()}
        return context.executor.variant({component: parameters})

    nbytes = sum(context.executor.weight(target).nbytes for target in changed)
    executor = context.loaded.get(key, nbytes, make, of=context.weights.key, drop=lambda executor: executor.close())
    return replace(context.weights, executor=executor, key=key)


def merge_into_text(context: Context, loras: Sequence[Lora], targets: frozenset[str]) -> Context:
    """The context with what LoRAs change at `targets` merged into the text encoders, where no weight has a schedule."""
    weights = {lora.adapter: lora.adapter.text_weight for lora in loras}
    for part in context.base.family.texts:
        context = replace(context, weights=merge(context, loras, weights, part.encoder, targets))
    return context


def _add(sums: dict[str, Tensor], executor: Executor, target: str, module: Module, weight: float) -> None:
    """Add a module's change to the weight of a layer or norm, and to its bias if that changes too."""
    name = f"{target}.weight"
    own = executor.parameter(name)
    sums[name] = sums.get(name, own.float()) + weight * change(own, module)
    if module.bias is not None or (isinstance(module, Gain) and module.of_bias is not None):
        name = f"{target}.bias"
        bias = executor.parameter(name)
        added = bias_change(bias, module)
        sums[name] = sums.get(name, bias.float()) + (0 if added is None else weight * added)
