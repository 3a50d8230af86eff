"""ControlNets in PyTorch: the graphs of `scumble_build.graphs.controlnet`, captured on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import ControlNetUnionModel
from torch import Tensor

from scumble_build.graphs.controlnet import ControlledEncoder, ControlNet, ControlNetUnion
from scumble_build.graphs.inputs import NetInputs
from scumble_server.executors.cuda import memory_format
from scumble_server.executors.device import Captured, Stepping
from scumble_server.executors.padding import Padding
from scumble_server.executors.protocol import NetModel

Residuals = Callable[[Tensor, Tensor, NetInputs], tuple[Tensor, ...]]
"""Of sample `(rows, 4, h, w)` and timestep `(rows,)`."""


@dataclass(frozen=True, slots=True)
class _Step:
    """The arguments of one call of a net, and where its residuals go; () if their shapes are not known yet."""

    sample: Tensor
    timestep: Tensor
    inputs: NetInputs
    into: tuple[Tensor, ...] = ()


def _computing(residuals: Residuals) -> Callable[[_Step], tuple[Tensor, ...]]:
    def compute(step: _Step) -> tuple[Tensor, ...]:
        made = residuals(step.sample, step.timestep, step.inputs)
        for target, residual in zip(step.into, made, strict=False):
            target.copy_(residual)
        return step.into or made

    return compute


class _CapturedNet:
    """A net whose steps are captured. All nets of a device share buffers, as they run in turn."""

    def __init__(self, stepping: Stepping, residuals: Residuals) -> None:
        self._residuals = residuals
        self._captured = Captured(stepping, _computing(residuals), "net.")
        self._padding = Padding()
        self._shapes: dict[torch.Size, list[tuple[int, ...]]] = {}
        """Of the sample, padded → of the residuals."""

    def __call__(self, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        if not self._captured.captures:
            return self._residuals(sample, timestep, inputs)
        rows, (sample, timestep, inputs) = len(sample), self._padding.of_net(sample, timestep, inputs)
        shapes = self._shapes.get(sample.shape)
        into = self._captured.outputs(shapes, sample.dtype) if shapes is not None else ()
        residuals = self._captured(_Step(sample, timestep, inputs, into))
        self._shapes.setdefault(sample.shape, [tuple(residual.shape) for residual in residuals])
        return tuple(residual[:rows] for residual in residuals)


class _TorchNet:
    """A net in torch. Several nets may share one graph."""

    def __init__(
        self, graph: ControlledEncoder, residuals: Residuals, like: Tensor, stepping: Stepping | None = None
    ) -> None:
        """Move the graph, which `residuals` runs, to `like`'s device and dtype."""
        graph.to(like.device, like.dtype, memory_format=memory_format(like.device))  # type: ignore[call-overload]
        self._graph = graph.eval().requires_grad_(requires_grad=False)
        self._like = like.new_empty(0)
        self._residuals = residuals if stepping is None else _CapturedNet(stepping, residuals)

    @property
    def kv_width(self) -> int:
        """K of the keys and values that `project` returns."""
        return sum(2 * kv_slice.width for kv_slice in self._graph.projection.slices)

    def check(self, sizes: Mapping[str, int]) -> None:
        """Do nothing: eager graphs accept any sizes."""

    @torch.inference_mode()
    def project(self, states: Tensor) -> Tensor:
        return self._graph.project(states.to(self._like))

    @torch.inference_mode()
    def condition(self, pooled: Tensor, sizes: Tensor) -> Tensor | None:
        return self._graph.condition(pooled.to(self._like), sizes.to(self._like.device))

    @torch.inference_mode()
    def embed(self, controls: Tensor, weights: Sequence[float]) -> Tensor:  # noqa: ARG002 - for union nets
        return self._graph.embed(controls.to(self._like))

    @torch.inference_mode()
    def residuals(self, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        moved = inputs.to(self._like.device, self._like.dtype)
        residuals = self._residuals(sample.to(self._like), timestep, moved)
        return tuple(residual.float() for residual in residuals)


class TorchNet(_TorchNet):
    """A net for one kind of control."""

    def __init__(self, graph: ControlNet, like: Tensor, stepping: Stepping | None = None) -> None:
        super().__init__(graph, graph.residuals, like, stepping)

    def of(self, kinds: tuple[int, ...]) -> TorchNet:  # noqa: ARG002 - for union nets
        return self

    def close(self) -> None:
        """Do nothing: there is nothing to save."""


class TorchUnionNet(_TorchNet):
    """A union net for certain kinds of control; rows with the same kinds share a run."""

    _graph: ControlNetUnion

    def __init__(
        self, graph: ControlNetUnion, like: Tensor, types: Sequence[int], stepping: Stepping | None = None
    ) -> None:
        present = torch.nn.Buffer(graph.present(types).to(like.device), persistent=False)
        super().__init__(graph, partial(graph.residuals_of, present), like, stepping)
        self._types = tuple(types)

    @torch.inference_mode()
    def embed(self, controls: Tensor, weights: Sequence[float]) -> Tensor:
        return self._graph.fuse(controls.to(self._like), self._types, weights)


class TorchUnion:
    """A union net in memory: a `TorchUnionNet` for each combination of kinds, all with the same weights."""

    def __init__(self, graph: ControlNetUnion, like: Tensor, stepping: Stepping | None = None) -> None:
        self._graph, self._like, self._stepping = graph, like, stepping
        self._nets: dict[tuple[int, ...], TorchUnionNet] = {}

    def of(self, kinds: tuple[int, ...]) -> TorchUnionNet:
        if kinds not in self._nets:
            self._nets[kinds] = TorchUnionNet(self._graph, self._like, kinds, self._stepping)
        return self._nets[kinds]

    def close(self) -> None:
        """Do nothing: there is nothing to save."""


def torch_nets(model: NetModel, like: Tensor, stepping: Stepping | None = None) -> TorchNet | TorchUnion:
    """Make the net of a model, on `like`'s device in its dtype. With `stepping`, steps run in its buffers."""
    if isinstance(model, ControlNetUnionModel):
        return TorchUnion(ControlNetUnion(model), like, stepping)
    return TorchNet(ControlNet(model), like, stepping)
