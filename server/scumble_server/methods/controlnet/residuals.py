"""Runs the ControlNets of a batch: each net once a step, for all the rows that ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scumble_build.graphs.inputs import NetInputs, StepInputs
from scumble_server.executors.protocol import Net
from scumble_server.methods.part import AtEachStep, BatchRows, stack_text


@dataclass(frozen=True, slots=True, eq=False)
class RowNet:
    """One ControlNet of one request. `added`, of a net for SDXL, is what the pooled text and the sizes add to its time.

    kv `(rows, T, K)`, the net's own of the text; hint `(1, C, H/8, W/8)`, the embedded control picture;
    scale `(rows, n)`, for each residual, the middle block's last; added `(rows, E)`. The net does not run for a row of
    zeros.
    """

    net: Net
    kv: Tensor
    hint: Tensor
    scale: Tensor
    added: Tensor | None = None


@dataclass(frozen=True, slots=True)
class NetCall:
    """A ControlNet and the m model rows that ask for it: rows (m,), scale (m, n) for each of n residuals."""

    net: Net
    rows: Tensor
    inputs: NetInputs
    scale: Tensor


def residuals_at_each_step(of_images: Sequence[tuple[RowNet, ...]], rows: BatchRows) -> AtEachStep | None:
    """None where no net runs."""
    calls = stack_nets(of_images, rows)
    if not calls:
        return None
    return lambda inputs, sample, timestep: with_residuals(inputs, calls, sample, timestep)


def stack_nets(of_images: Sequence[tuple[RowNet, ...]], rows: BatchRows) -> list[NetCall]:
    """One call for each net; model rows in which it has no say are left out of it."""
    asking: dict[int, list[tuple[int, RowNet]]] = {}
    for start, nets in zip(rows.starts, of_images, strict=True):
        for net in nets:
            asking.setdefault(id(net.net), []).append((start, net))
    calls = (_net_call(nets, rows.device) for nets in asking.values())
    return [call for call in calls if len(call.rows)]


def _net_call(asking: Sequence[tuple[int, RowNet]], device: str) -> NetCall:
    places, kv, hint, scale, added = [], [], [], [], []
    for start, net in asking:
        runs = net.scale.any(1).nonzero()[:, 0]
        places.append(start + runs)
        kv.append(net.kv[runs])
        hint.append(net.hint.expand(len(runs), -1, -1, -1))
        scale.append(net.scale[runs])
        if net.added is not None:
            added.append(net.added[runs])
    texts, mask = stack_text(kv)
    inputs = NetInputs(
        texts.to(device),
        torch.cat(hint).to(device),
        torch.cat(added).to(device) if added else None,
        mask.to(device) if mask is not None else None,
    )
    return NetCall(asking[0][1].net, torch.cat(places).to(device), inputs, torch.cat(scale).to(device))


def with_residuals(inputs: StepInputs, calls: Sequence[NetCall], sample: Tensor, timestep: Tensor) -> StepInputs:
    """Add the residuals of at least one net. sample `(rows, 4, h, w)` and timestep `(rows,)` are the denoiser's."""
    total: list[Tensor] = []
    for call in calls:
        residuals = call.net.residuals(sample[call.rows], timestep[call.rows], call.inputs)
        total = total or [residual.new_zeros(len(sample), *residual.shape[1:]) for residual in residuals]
        for i, residual in enumerate(residuals):
            total[i].index_add_(0, call.rows, residual * call.scale[:, i, None, None, None])
    return replace(inputs, residuals=tuple(total))
