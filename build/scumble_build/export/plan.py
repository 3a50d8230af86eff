"""The graphs of a base, and the parts of each that stay in float32 in half precision.

* Norms of every part: sums over a whole map overflow or lose small terms.
* The embedding of time steps and sizes: half precision cannot represent 999.5 and 1537.
* Attention of bases whose config has `upcast_attention` (SD 2.1): its scores overflow.
* All of a VAE whose config has `force_upcast` (SDXL's), in fp16: its maps overflow. bfloat16 has float32's range.

Softmax stays in the graph's precision: its results are in 0…1, and runtimes sum in float32 inside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from torch import Tensor

from scumble_build.export.denoiser import GRAPHS, denoiser_graph
from scumble_build.export.graph import Graph
from scumble_build.export.manifest import GraphPart, Precision
from scumble_build.export.pictures import decoder_graph, encoder_graph, vision_graph
from scumble_build.export.text import projection_graph, text_graph
from scumble_build.graphs.denoiser import Denoiser, KVProjection
from scumble_build.graphs.families import Family
from scumble_build.graphs.models import Models
from scumble_build.graphs.text import TextEncoder


def component_of(name: str) -> str:
    """Return the component whose weights a graph reads."""
    if name.startswith("controlnet"):
        return "controlnet"
    return {"kv_projection": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}.get(name, name.partition(".")[0])


_NORMS = "norms"
_EMBEDDINGS = "embedding of time steps and sizes"
_ATTENTION = "attention"
_EVERYTHING = "everything"


def kept_in_fp32(config: Any) -> tuple[str, ...]:
    """Return what a UNet or ControlNet in half precision computes in float32."""
    return (_NORMS, _EMBEDDINGS, *((_ATTENTION,) if config.upcast_attention else ()))


@dataclass(frozen=True, slots=True)
class BaseGraphs:
    """A base's networks with adapters as inputs, in `precision`; `texts` by folder name.

    `states` are all tensors, by component and by name in its file.
    """

    projection: KVProjection
    denoiser: Denoiser
    texts: Mapping[str, TextEncoder]
    vae: Any
    states: Mapping[str, Mapping[str, Tensor]]
    precision: Precision
    vision: Any = None
    """The base's own image encoder, if it has one."""

    @classmethod
    def of(cls, models: Models, family: Family, precision: Precision, vision: Any = None) -> Self:
        """Adapt `models`, which are in `precision`, in place."""
        components: dict[str, Any] = {"unet": models.unet, **models.texts, "vae": models.vae}
        components |= {"image_encoder": vision} if vision is not None else {}
        for model in components.values():
            model.eval().requires_grad_(requires_grad=False)
        states = {name: dict(model.state_dict()) for name, model in components.items()}
        projection = KVProjection(models.unet)
        denoiser = Denoiser(models.unet, projection.slices)
        texts = {name: TextEncoder(text, name, penultimate=family.penultimate) for name, text in models.texts.items()}
        return cls(projection, denoiser, texts, models.vae, states, precision, vision)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all graphs."""
        denoisers = (f"unet.{which}" for which in GRAPHS)
        vision = ("image_encoder",) if self.vision is not None else ()
        return (*self.texts, "kv_projection", *denoisers, "vae_decoder", "vae_encoder", *vision)

    def graph(self, name: str) -> Graph:
        """Make one of `names`."""
        half = self.precision != "fp32"
        norms = (_NORMS,) if half else ()
        if name in self.texts:
            return text_graph(cast("GraphPart", name), self.texts[name], self._of(name), self.precision, norms)
        if name == "kv_projection":
            return projection_graph(self.projection, self._of("unet"), self.precision)
        if name.startswith("unet."):
            unet: Any = self.denoiser.unet
            in_fp32 = kept_in_fp32(unet.config) if half else ()
            which = name.removeprefix("unet.")
            return denoiser_graph(
                which, self.denoiser, self.projection.slices, self._of("unet"), self.precision, in_fp32
            )
        if name == "image_encoder":
            return vision_graph(self.vision, self._of("image_encoder"), self.precision, norms)
        make = {"vae_decoder": decoder_graph, "vae_encoder": encoder_graph}[name]
        if half and self.vae.dtype.itemsize == 4:
            return make(self.vae, self._of("vae"), "fp32", (_EVERYTHING,))
        return make(self.vae, self._of("vae"), self.precision, norms)

    def with_vae(self, vae: Any) -> BaseGraphs:
        """Return the same graphs with another VAE, which is on the right device already."""
        return replace(self, vae=vae, states={**self.states, "vae": dict(vae.state_dict())})

    def graph_state(self, name: str) -> Mapping[str, Tensor]:
        """Return the tensors of a graph's component."""
        return self.states[component_of(name)]

    def config(self, name: str) -> dict[str, Any]:
        """Return the config of a graph's component, which with the code decides the graph's structure."""
        if name in self.texts:
            return dict(self.texts[name].model.config.to_dict())
        if name == "image_encoder":
            return dict(self.vision.config.to_dict())
        component: Any = self.vae if name.startswith("vae") else self.denoiser.unet
        return {key: value for key, value in component.config.items() if not key.startswith("_")}

    def _of(self, component: str) -> dict[str, Tensor]:
        return {f"{component}.{name}": tensor for name, tensor in self.states[component].items()}
