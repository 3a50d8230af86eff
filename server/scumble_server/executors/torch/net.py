"""ControlNets in eager PyTorch: the graphs of `scumble_build.graphs.controlnet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import ControlNetUnionModel
from torch import Tensor

from scumble_build.graphs.controlnet import ControlledEncoder, ControlNet, ControlNetUnion
from scumble_build.graphs.inputs import NetInputs
from scumble_server.executors.cuda import memory_format
from scumble_server.executors.protocol import NetModel


class _TorchNet:
    """A net in torch. Owns nothing: several nets may share one graph."""

    def __init__(self, graph: ControlledEncoder, like: Tensor) -> None:
        """Move the graph to `like`'s device and dtype."""
        graph.to(like.device, like.dtype, memory_format=memory_format(like.device))  # type: ignore[call-overload]
        self._graph = graph.eval().requires_grad_(requires_grad=False)
        self._like = like.new_empty(0)

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

    def _moved(self, inputs: NetInputs) -> NetInputs:
        return inputs.to(self._like.device, self._like.dtype)


class TorchNet(_TorchNet):
    """A net for one kind of control."""

    _graph: ControlNet

    def of(self, kinds: tuple[int, ...]) -> TorchNet:  # noqa: ARG002 - for union nets
        return self

    def close(self) -> None:
        """Do nothing: there is nothing to save."""

    @torch.inference_mode()
    def residuals(self, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        residuals = self._graph.residuals(sample.to(self._like), timestep, self._moved(inputs))
        return tuple(residual.float() for residual in residuals)


class TorchUnionNet(_TorchNet):
    """A union net for certain kinds of control; rows with the same kinds share a run."""

    _graph: ControlNetUnion

    def __init__(self, graph: ControlNetUnion, like: Tensor, types: Sequence[int]) -> None:
        super().__init__(graph, like)
        self._types = tuple(types)
        self._present = self._graph.present(self._types)

    @torch.inference_mode()
    def embed(self, controls: Tensor, weights: Sequence[float]) -> Tensor:
        return self._graph.fuse(controls.to(self._like), self._types, weights)

    @torch.inference_mode()
    def residuals(self, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        moved = self._moved(inputs)
        residuals = self._graph.residuals_of(self._present, sample.to(self._like), timestep, moved)
        return tuple(residual.float() for residual in residuals)


class TorchUnion:
    """A union net in memory: a `TorchUnionNet` for each combination of kinds, all with the same weights."""

    def __init__(self, graph: ControlNetUnion, like: Tensor) -> None:
        self._graph, self._like = graph, like
        self._nets: dict[tuple[int, ...], TorchUnionNet] = {}

    def of(self, kinds: tuple[int, ...]) -> TorchUnionNet:
        if kinds not in self._nets:
            self._nets[kinds] = TorchUnionNet(self._graph, self._like, kinds)
        return self._nets[kinds]

    def close(self) -> None:
        """Do nothing: there is nothing to save."""


def torch_nets(model: NetModel, like: Tensor) -> TorchNet | TorchUnion:
    """Make the net of a model, on `like`'s device in its dtype."""
    if isinstance(model, ControlNetUnionModel):
        return TorchUnion(ControlNetUnion(model), like)
    return TorchNet(ControlNet(model), like)
