"""ControlNets in eager PyTorch: the graphs of `scumble_build.graphs.controlnet` with weights of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import ControlNetUnionModel
from torch import Tensor

from scumble_build.graphs.controlnet import ControlledEncoder, ControlNet, ControlNetUnion
from scumble_build.graphs.inputs import NetInputs
from scumble_server.executors.protocol import NetModel


class _TorchNet:
    """Owns nothing: several nets may share one graph."""

    def __init__(self, graph: ControlledEncoder, like: Tensor) -> None:
        """On `like`'s device, in its precision."""
        self._graph = graph.to(like.device, like.dtype).eval().requires_grad_(requires_grad=False)
        self._like = like.new_empty(0)

    @property
    def kv_width(self) -> int:
        """K of the keys and values that `project` gives."""
        return sum(2 * place.width for place in self._graph.projection.slices)

    def check(self, sizes: Mapping[str, int]) -> None:
        """Nothing to do: eager graphs take any sizes."""

    @torch.inference_mode()
    def project(self, states: Tensor) -> Tensor:
        return self._graph.project(states.to(self._like))

    @torch.inference_mode()
    def condition(self, pooled: Tensor, sizes: Tensor) -> Tensor | None:
        return self._graph.condition(pooled.to(self._like), sizes.to(self._like.device))

    @torch.inference_mode()
    def embed(self, controls: Tensor, weights: Sequence[float]) -> Tensor:  # noqa: ARG002 - a union net's
        return self._graph.embed(controls.to(self._like))

    def _moved(self, inputs: NetInputs) -> NetInputs:
        return inputs.to(self._like.device, self._like.dtype)


class TorchNet(_TorchNet):
    """A net for one kind of control."""

    _graph: ControlNet

    def of(self, kinds: tuple[int, ...]) -> TorchNet:  # noqa: ARG002 - a union net's
        return self

    def close(self) -> None:
        """Nothing of it outlives the process."""

    @torch.inference_mode()
    def residuals(self, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        residuals = self._graph.residuals(sample.to(self._like), timestep, self._moved(inputs))
        return tuple(residual.float() for residual in residuals)


class TorchUnionNet(_TorchNet):
    """A union net for pictures of certain kinds of control: rows with the same kinds share a run."""

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
    """A union net in memory: a `TorchUnionNet` for each choice of kinds, all with the same weights."""

    def __init__(self, graph: ControlNetUnion, like: Tensor) -> None:
        self._graph, self._like = graph, like
        self._nets: dict[tuple[int, ...], TorchUnionNet] = {}

    def of(self, kinds: tuple[int, ...]) -> TorchUnionNet:
        if kinds not in self._nets:
            self._nets[kinds] = TorchUnionNet(self._graph, self._like, kinds)
        return self._nets[kinds]

    def close(self) -> None:
        """Nothing of it outlives the process."""


def torch_nets(model: NetModel, like: Tensor) -> TorchNet | TorchUnion:
    """On `like`'s device, in its precision."""
    if isinstance(model, ControlNetUnionModel):
        return TorchUnion(ControlNetUnion(model), like)
    return TorchNet(ControlNet(model), like)
