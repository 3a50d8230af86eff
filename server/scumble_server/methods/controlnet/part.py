"""What rows carry of ControlNets, T2I-Adapters and LLLites, and how it is stacked into a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scumble_build.graphs.includes import Include
from scumble_build.graphs.inputs import LiteInputs, StepInputs
from scumble_build.graphs.lllite import Embeddings, LLLite
from scumble_server.executors.protocol import Net
from scumble_server.methods.context import Context, Text
from scumble_server.methods.controlnet.checks import compatibility, mode, picture_scales
from scumble_server.methods.controlnet.nets import Control, control_of, of_text
from scumble_server.methods.controlnet.residuals import RowNet, residuals_at_each_step
from scumble_server.methods.controlnet.scales import of_features, of_lite, of_residuals
from scumble_server.methods.part import AtEachStep, BatchRows, Part, spread
from scumble_server.request.adapter import ResolvedAdapter


@dataclass(frozen=True, slots=True, eq=False)
class RowLite:
    """One ControlNet-LLLite of one request: its picture embedded, `(1, N, e)` for each target; weight `(rows,)`."""

    net: LLLite
    embeddings: Embeddings
    weight: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ControlPart(Part):
    """The ControlNets of one request that act in a phase.

    features are what its T2I-Adapters add together, `(1, C, h, w)` or `(rows, C, h, w)` for each down block.
    """

    nets: tuple[RowNet, ...] = ()
    features: tuple[Tensor, ...] | None = None
    lites: tuple[RowLite, ...] = ()

    @classmethod
    def of(cls, context: Context, weights: Mapping[ResolvedAdapter, float], text: Text) -> ControlPart | None:
        """None where no adapter acts."""
        acting = [(control_of(context, adapter), weight) for adapter, weight in weights.items() if weight]
        if not acting:
            return None
        nets = [
            _row_net(context, control, weight, net, hint, text)
            for control, weight in acting
            if (net := control.net) is not None and (hint := control.hint) is not None
        ]
        lites = [
            _row_lite(context, control, weight, lite)
            for control, weight in acting
            if (lite := control.lite) is not None
        ]
        return cls(tuple(nets), _features(context, acting), tuple(lites))

    @property
    def includes(self) -> frozenset[Include]:
        optional: dict[Include, bool] = {"residuals": bool(self.nets), "features": self.features is not None}
        return frozenset(name for name, is_there in optional.items() if is_there)

    @classmethod
    def stack(cls, parts: Sequence[ControlPart | None], rows: BatchRows, inputs: StepInputs) -> StepInputs:
        return replace(
            inputs,
            features=_stack_features([part.features if part is not None else None for part in parts], rows),
            lites=_stack_lites([part.lites if part is not None else () for part in parts], rows),
        )

    @classmethod
    def at_each_step(cls, parts: Sequence[ControlPart | None], rows: BatchRows) -> AtEachStep | None:
        return residuals_at_each_step([part.nets if part is not None else () for part in parts], rows)


def _row_net(context: Context, control: Control, weight: float, net: Net, hint: Tensor, text: Text) -> RowNet:
    adapter = control.adapter
    fit, scales = compatibility(adapter), picture_scales(adapter)
    weight = weight * scales[0] if len(scales) == 1 else 1.0  # of several pictures, each one's weight is in the hint
    scale = of_residuals(mode(adapter), weight, len(fit.widths), context.sides, pools=fit.pools)
    kv, added = of_text(context, adapter, net, text)
    return RowNet(net, kv, hint, spread(scale, context.rows).to(hint.device), added)


def _row_lite(context: Context, control: Control, weight: float, lite: LLLite) -> RowLite:
    return RowLite(
        lite, control.embeddings, spread(of_lite(mode(control.adapter), weight, context.sides), context.rows)
    )


def _features(context: Context, acting: Sequence[tuple[Control, float]]) -> tuple[Tensor, ...] | None:
    """Add up what T2I-Adapters give, each at its weight; None without any."""
    total: list[Tensor] = []
    for control, weight in acting:
        if control.features:
            scale = of_features(mode(control.adapter), weight, len(control.features), context.sides)
            features = [
                feature * scale[:, level, None, None, None].to(feature)
                for level, feature in enumerate(control.features)
            ]
            total = [a + b for a, b in zip(total, features, strict=True)] if total else features
    return tuple(feature if len(feature) == 1 else spread(feature, context.rows) for feature in total) or None


def _stack_features(of_images: Sequence[tuple[Tensor, ...] | None], rows: BatchRows) -> tuple[Tensor, ...] | None:
    """Stack `(rows, C, h, w)` for each down block, zero in rows that have none."""
    pattern = next((features for features in of_images if features is not None), None)
    if pattern is None:
        return None
    return tuple(
        torch.cat(
            [
                (torch.zeros_like(like) if features is None else features[block]).expand(count, -1, -1, -1)
                for features, count in zip(of_images, rows.counts, strict=True)
            ]
        ).to(rows.device)
        for block, like in enumerate(pattern)
    )


def _stack_lites(of_images: Sequence[tuple[RowLite, ...]], rows: BatchRows) -> tuple[LiteInputs, ...]:
    """One for each LLLite; model rows on which it does not act are left out of it."""
    asking: dict[int, list[tuple[Tensor, Tensor, RowLite]]] = {}
    for start, lites in zip(rows.starts, of_images, strict=True):
        for lite in lites:
            acts = lite.weight.nonzero()[:, 0]
            if len(acts):
                asking.setdefault(id(lite.net), []).append((start + acts, lite.weight[acts], lite))
    return tuple(
        LiteInputs(
            torch.cat([places for places, _, _ in members]).to(rows.device),
            members[0][2].net,
            {
                target: torch.cat([lite.embeddings[target].expand(len(places), -1, -1) for places, _, lite in members])
                for target in members[0][2].embeddings
            },
            torch.cat([weight for _, weight, _ in members]).to(rows.device),
        )
        for members in asking.values()
    )
