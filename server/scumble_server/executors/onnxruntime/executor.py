"""The ONNX Runtime executor: a base's exported graphs on a CPU, or on CUDA where that provider is installed.

Weights stay torch's, as `TorchExecutor` loaded them: sessions are given them as initializers, and what reads weights
(DoRA, merged LoRAs, digests, variants) reads the same tensors. Graphs come from a cache on disk (`GraphCache`). Those
that every request runs are there when the executor is made; of the denoiser's others (`export.denoiser`) each is made
when `prepare` first says that rows will need it, so that no step waits for one. ControlNets have sessions of their own;
T2I-Adapters, image encoders and hypernetworks on text run in torch beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from scumble.errors import Refused
from scumble_build.export.cached import GraphCache
from scumble_build.export.control import NetGraphs
from scumble_build.export.denoiser import graph_for
from scumble_build.export.graph import DTYPES
from scumble_build.export.manifest import Include, Precision
from scumble_build.export.plan import BaseGraphs
from scumble_build.graphs.adapted import Factors
from scumble_build.graphs.families import Family
from scumble_build.graphs.inputs import StepInputs
from scumble_build.graphs.models import load_autoencoder
from scumble_build.graphs.text import Encoded, Overrides
from scumble_registry import Version
from scumble_server.executors.feeds import factor_feeds, image_feeds, maps, pooled_place, positions, residual_feeds
from scumble_server.executors.graph_net import GraphNets
from scumble_server.executors.onnxruntime.sessions import OrtSessions, check_available, version
from scumble_server.executors.protocol import Changed, NetModel, Nets
from scumble_server.executors.sessions import Sessions
from scumble_server.executors.torch.executor import PRECISION_OF, TorchExecutor
from scumble_server.executors.torch.vae import TorchVae

_ALWAYS = ("kv_projection", "unet.bare", "vae_decoder")


@dataclass(slots=True)
class _Fed:
    """What was made of a batch's inputs, for its next step: they stay the same until its composition changes."""

    inputs: StepInputs
    which: str
    feeds: dict[str, Tensor]

    def is_of(self, inputs: StepInputs, which: str) -> bool:
        """Residuals are new at every step; the rest is the same objects."""
        same = (getattr(self.inputs, name) is getattr(inputs, name) for name in ("kv", "factors", "images", "features"))
        return which == self.which and all(same)


class OnnxRuntimeExecutor:
    """Owns sessions over the weights of one `TorchExecutor`."""

    copies = 2
    """ONNX Runtime keeps weights a second time, packed for its kernels."""

    def __init__(
        self,
        weights: TorchExecutor,
        cache: GraphCache,
        parent: OrtSessions[BaseGraphs] | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        """Exports what every request runs, if the cache has it not and no other `sessions` are given."""
        self._weights, self._cache = weights, cache
        self._device = torch.device(weights.device).type
        self._sessions: Sessions = sessions or OrtSessions(weights.graphs, cache, self._device, parent)
        self.step_layout, self.kv_layout = weights.step_layout, weights.kv_layout
        self.text_layouts, self.kv_slices = weights.text_layouts, weights.kv_slices
        self.max_rows, self.most_pages, self.limits = weights.max_rows, weights.most_pages, weights.limits
        self._texts = tuple(weights.graphs.texts)
        self._fed: _Fed | None = None
        for name in (*self._texts, *_ALWAYS):
            self._sessions[name]
        self.vae = _vae(self._sessions)

    @classmethod
    def load(
        cls,
        folder: Path,
        family: Family,
        cache: Path,
        device: str = "cpu",
        precision: Precision = "fp32",
        max_rows: int = 32,
    ) -> OnnxRuntimeExecutor:
        """A folder in the diffusers layout; `cache` keeps exported graphs.

        Raises Unavailable, saying what is missing, where ONNX Runtime is not there or cannot run this.
        """
        check_available(device, precision)
        return cls(TorchExecutor.load(folder, family, device, precision, max_rows), GraphCache(cache))

    def variant(
        self,
        changed: Changed,
        configs: Path | None = None,
        of: Version | None = None,  # noqa: ARG002 - what engines go by
    ) -> OnnxRuntimeExecutor:
        parent = self._sessions if isinstance(self._sessions, OrtSessions) else None
        return OnnxRuntimeExecutor(self._weights.variant(changed, configs), self._cache, parent)

    @property
    def device(self) -> str:
        return self._weights.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.dtype

    def prepare(self, includes: frozenset[Include], sizes: Mapping[str, int]) -> None:
        for name in (f"unet.{graph_for(includes)}", "vae_decoder"):
            self._sessions[name].limits.check(sizes)

    @torch.inference_mode()
    def encode(
        self,
        encoder: int,
        tokens: Tensor,
        factors: Factors | None,
        overrides: Overrides | None = None,
        skip: int = 0,
        mask: Tensor | None = None,
    ) -> Encoded:
        name = self._texts[encoder]
        rows, length = tokens.shape
        text = self._sessions.graphs.texts[name]
        config: Any = text.model.config
        vectors = torch.zeros(rows, length, config.hidden_size, dtype=self.dtype)
        overridden = torch.zeros(rows, length, dtype=torch.bool)
        if overrides is not None:
            places = overrides.row.cpu(), overrides.position.cpu()
            vectors[places] = overrides.vectors.to("cpu", self.dtype)
            overridden[places] = True
        found = self._sessions[name](
            {
                "tokens": tokens,
                "mask": torch.ones_like(overridden) if mask is None else mask.bool(),
                "vectors": vectors,
                "overridden": overridden,
                "skip": torch.tensor([skip]),
                "pool": pooled_place(tokens, config.eos_token_id),
                **factor_feeds(factors, rows, self._sessions[name].graph.factors),
            }
        )
        return Encoded(found[0], found[1] if len(found) > 1 else None)

    @torch.inference_mode()
    def project(self, states: Tensor, factors: Factors | None, of_values: Tensor | None = None) -> Tensor:
        session = self._sessions["kv_projection"]
        feeds = {"states": states, "of_values": states if of_values is None else of_values}
        return session(feeds | factor_feeds(factors, len(states), session.graph.factors))[0]

    @torch.inference_mode()
    def denoise(self, sample: Tensor, timestep: Tensor, inputs: StepInputs) -> Tensor:
        """Raises Refused for what changes the graph (self-attention hypernetworks, LLLite); admission asks before."""
        if inputs.contexts or inputs.lites:
            raise Refused("what changes the graph needs the torch executor: serve with --executor torch")
        which = f"unet.{graph_for(self._needs(inputs))}"
        if self._fed is None or not self._fed.is_of(inputs, which):
            self._fed = _Fed(inputs, which, self._stacked(which, inputs, sample))
        session = self._sessions[which]
        maps = residual_feeds(session.graph.inputs, inputs.residuals, sample)
        return session({"sample": sample, "timestep": timestep, **self._fed.feeds, **maps})[0]

    def _needs(self, inputs: StepInputs) -> frozenset[Include]:
        factors = inputs.factors
        found: dict[Include, bool] = {
            "factors": factors is not None,
            "full": factors is not None and factors.rest is not None,
            "stretch_out": factors is not None and factors.stretch_out is not None,
            "stretch_in": factors is not None and factors.stretch_in is not None,
            "images": inputs.images is not None,
            "residuals": inputs.residuals is not None,
            "features": inputs.features is not None,
        }
        return frozenset(name for name, needed in found.items() if needed)

    def _stacked(self, which: str, inputs: StepInputs, sample: Tensor) -> dict[str, Tensor]:
        """What stays the same from step to step, as the graph takes it."""
        rows, graph = len(sample), self._sessions[which].graph
        takes, dtype = set(graph.includes), self.dtype
        mask = torch.ones(inputs.kv.shape[:2], dtype=torch.bool) if inputs.kv_mask is None else inputs.kv_mask
        feeds = {"kv": inputs.kv.to(dtype), "kv_mask": mask}
        if inputs.pooled is not None and inputs.sizes is not None:
            feeds |= {"pooled": inputs.pooled.to(dtype), "sizes": inputs.sizes}
        feeds |= factor_feeds(inputs.factors, rows, graph.factors)
        if "images" in takes:
            feeds |= image_feeds(inputs.images, rows, inputs.kv.shape[-1], positions(graph, sample))
        if "features" in takes:
            ports = [port for port in graph.inputs if port.name.startswith("feature_")]
            feeds |= {
                port.name: feature for port, feature in zip(ports, maps(ports, inputs.features, sample), strict=True)
            }
        dtypes = {port.name: DTYPES[port.dtype] for port in graph.inputs}
        return {name: tensor.to(dtypes[name]) for name, tensor in feeds.items() if name in dtypes}

    def load_net(self, version: Version, load: Callable[[], NetModel]) -> Nets:  # noqa: ARG002 - what engines go by
        graphs = NetGraphs.of(load().to(self._weights.device), PRECISION_OF[self.dtype])
        sessions = OrtSessions(graphs, self._cache, self._device)
        for name in graphs.names:
            sessions[name]  # exported now, so that no step waits for it
        return GraphNets(sessions)

    def load_vae(self, folder: Path) -> TorchVae:
        vae = load_autoencoder(folder, self.dtype).to(self._weights.device).eval()
        return _vae(OrtSessions(self._weights.graphs.with_vae(vae), self._cache, self._device))

    def weight(self, target: str) -> Tensor:
        return self._weights.weight(target)

    def parameter(self, name: str) -> Tensor:
        return self._weights.parameter(name)

    def weights_digest(self) -> str:
        return self._weights.weights_digest()

    def describe(self) -> dict[str, str]:
        return {**self._weights.describe(), "executor": "onnxruntime", "onnxruntime": version()}


class _Half(nn.Module):
    """The encoder or decoder of a VAE, as diffusers calls it."""

    def __init__(self, sessions: Sessions, name: str, takes: str) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.empty(0, device=sessions.graphs.vae.device), requires_grad=False)
        self._sessions, self._name, self._takes = sessions, name, takes

    def forward(self, x: Tensor, *_unused: Tensor | None) -> Tensor:
        return self._sessions[self._name]({self._takes: x})[0]


def _vae(sessions: Sessions) -> TorchVae:
    """diffusers' own, with its halves replaced: scaling and tiles stay what they are. It takes and gives float32."""
    with torch.device("meta"):
        kind: Any = AutoencoderKL
        shell = kind.from_config(sessions.graphs.vae.config)
    shell.decoder = _Half(sessions, "vae_decoder", "latents")
    shell.encoder = _Half(sessions, "vae_encoder", "pixels")
    shell.quant_conv = shell.post_quant_conv = nn.Identity()
    shell.eval()
    return TorchVae(shell)
