"""A ControlNet that runs in its exported graphs (`scumble_build.export.control`), in ONNX Runtime or TensorRT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scumble_build.graphs.inputs import NetInputs
from scumble_server.executors.sessions import NamedSessions


class GraphNets:
    """A ControlNet in memory: one `GraphNet`, or for a union net one per combination of kinds. Owns the sessions."""

    def __init__(self, sessions: NamedSessions) -> None:
        """Take the sessions of a net's graphs; only SDXL's nets have `controlnet_condition`."""
        self._sessions = sessions
        self._nets: dict[tuple[int, ...], GraphNet] = {}

    def of(self, kinds: tuple[int, ...]) -> GraphNet:
        if kinds not in self._nets:
            self._nets[kinds] = GraphNet(self._sessions, kinds)
        return self._nets[kinds]

    def close(self) -> None:
        self._sessions.close()


class GraphNet:
    """A net for certain kinds of control. Owns nothing: several nets may share sessions."""

    def __init__(self, sessions: NamedSessions, kinds: tuple[int, ...]) -> None:
        self._sessions, self._kinds = sessions, kinds
        self._step = sessions["controlnet"]
        self._dims = {port.name: port.dims for port in self._step.graph.inputs}
        self._present: dict[str, Tensor] = {}
        if "kinds" in self._dims:
            present = torch.zeros(int(self._dims["kinds"][0]))
            present[list(kinds)] = 1
            self._present = {"kinds": present}

    @property
    def kv_width(self) -> int:
        return int(self._dims["kv"][-1])

    def check(self, sizes: Mapping[str, int]) -> None:
        self._step.limits.check(sizes)

    @torch.inference_mode()
    def project(self, states: Tensor) -> Tensor:
        return self._sessions["controlnet_kv"]({"states": states})[0]

    @torch.inference_mode()
    def embed(self, controls: Tensor, weights: Sequence[float]) -> Tensor:
        feeds = {"control": controls}
        if self._present:
            feeds |= {"kinds": torch.tensor(self._kinds), "strength": torch.tensor(list(weights))}
        return self._sessions["controlnet_hint"](feeds)[0]

    @torch.inference_mode()
    def condition(self, pooled: Tensor, sizes: Tensor) -> Tensor | None:
        if "added" not in self._dims:
            return None
        return self._sessions["controlnet_condition"]({"pooled": pooled, "sizes": sizes})[0]

    @torch.inference_mode()
    def residuals(self, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        kv, mask = inputs.kv, inputs.kv_mask
        feeds = {
            "sample": sample,
            "timestep": timestep,
            "kv": kv,
            "kv_mask": torch.ones(kv.shape[:2], dtype=torch.bool) if mask is None else mask,
            "hint": inputs.hint,
            **self._present,
        }
        if inputs.added is not None:
            feeds["added"] = inputs.added
        return tuple(residual.float() for residual in self._step(feeds))
