"""An executor over the sessions of a base's exported graphs, the common part of ONNX Runtime and TensorRT.

A `TorchExecutor` owns the weights, for everything that reads them (DoRA, merged LoRAs, digests, variants). A step runs
in the smallest graph that has all inputs of the batch (`export.denoiser`). T2I-Adapters, image encoders and
hypernetworks on text run in torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scumble.errors import Refused
from scumble_build.export.denoiser import graph_for
from scumble_build.graphs.adapted import Factors
from scumble_build.graphs.includes import Include
from scumble_build.graphs.inputs import StepInputs
from scumble_build.graphs.text import EncodedText, TextInputs
from scumble_registry import Version
from scumble_server.executors.feeds import constant_feeds, factor_feeds, residual_feeds, text_feeds
from scumble_server.executors.graph_vae import graph_vae
from scumble_server.executors.protocol import Changed, NetModel, Nets, Vae
from scumble_server.executors.sessions import BaseSessions
from scumble_server.executors.torch.executor import TorchExecutor

ALWAYS = ("kv_projection", "unet.bare", "vae_decoder")
"""The graphs that every request runs, besides the text encoders."""


@dataclass(slots=True)
class _LastStep:
    """The last step's feeds that do not change until the batch's composition changes."""

    inputs: StepInputs
    graph: str
    feeds: dict[str, Tensor]

    def is_for(self, inputs: StepInputs, graph: str) -> bool:
        """Return whether the feeds can be used again. All inputs of an unchanged batch except residuals are the same
        objects.
        """
        same = (getattr(self.inputs, name) is getattr(inputs, name) for name in ("kv", "factors", "images", "features"))
        have_residuals = (self.inputs.residuals is None) == (inputs.residuals is None)
        return graph == self.graph and have_residuals and all(same)


class ExportedExecutor(ABC):
    """Owns the sessions over one set of weights. Subclasses for ONNX Runtime and TensorRT open them."""

    changes_graphs = False

    def __init__(self, weights: TorchExecutor, sessions: BaseSessions) -> None:
        """Open the sessions that every request runs, so that errors show on loading."""
        self._weights, self._sessions = weights, sessions
        self.step_layout, self.kv_layout = weights.step_layout, weights.kv_layout
        self.text_layouts, self.kv_slices = weights.text_layouts, weights.kv_slices
        self.max_rows, self.most_pages, self.limits = weights.max_rows, weights.most_pages, weights.limits
        self._texts = tuple(sessions.graphs.texts)
        self._last: _LastStep | None = None
        for name in (*self._texts, *ALWAYS):
            sessions[name]
        self.vae = graph_vae(sessions, self.device)

    @property
    @abstractmethod
    def device(self) -> str: ...

    @abstractmethod
    def variant(self, changed: Changed, configs: Path | None = None, of: Version | None = None) -> ExportedExecutor: ...

    @abstractmethod
    def load_net(self, version: Version, load: Callable[[], NetModel]) -> Nets: ...

    @abstractmethod
    def load_vae(self, folder: Path) -> Vae: ...

    @abstractmethod
    def describe(self) -> dict[str, str]: ...

    @property
    @abstractmethod
    def copies(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.dtype

    def prepare(self, includes: frozenset[Include], sizes: Mapping[str, int]) -> None:
        for name in (f"unet.{graph_for(includes)}", "vae_decoder"):
            self._sessions[name].limits.check(sizes)

    @torch.inference_mode()
    def encode(self, encoder: int, inputs: TextInputs) -> EncodedText:
        name = self._texts[encoder]
        session = self._sessions[name]
        config = self._sessions.graphs.texts[name].model.config
        outputs = session(text_feeds(inputs, config, self.dtype, session.graph.factors))
        return EncodedText(outputs[0], outputs[1] if len(outputs) > 1 else None)

    @torch.inference_mode()
    def project(self, states: Tensor, factors: Factors | None, of_values: Tensor | None = None) -> Tensor:
        session = self._sessions["kv_projection"]
        feeds = {"states": states, "of_values": states if of_values is None else of_values}
        return session(feeds | factor_feeds(factors, len(states), session.graph.factors))[0]

    @torch.inference_mode()
    def denoise(self, sample: Tensor, timestep: Tensor, inputs: StepInputs) -> Tensor:
        """Predict as `Executor.denoise`. Raises Refused for adapters that change the graph (self-attention
        hypernetworks, LLLite); admission checks this earlier.
        """
        if inputs.contexts or inputs.lites:
            raise Refused("adapters that change the graph need the torch executor: serve with --executor torch")
        name = f"unet.{graph_for(inputs.includes)}"
        session = self._sessions[name]
        if self._last is None or not self._last.is_for(inputs, name):
            self._last = _LastStep(inputs, name, constant_feeds(inputs, session.graph, sample, self.dtype))
        feeds = {"sample": sample, "timestep": timestep, **self._last.feeds}
        if inputs.residuals is not None:
            feeds |= residual_feeds(session.graph.inputs, inputs.residuals, sample)
        return session(feeds)[0]

    def weight(self, target: str) -> Tensor:
        return self._weights.weight(target)

    def parameter(self, name: str) -> Tensor:
        return self._weights.parameter(name)

    def weights_digest(self) -> str:
        return self._weights.weights_digest()

    def close(self) -> None:
        self._sessions.close()
