"""A ControlNet's graphs: one runs at every step, the others once per request.

| graph                | |
|----------------------|-|
| controlnet           | sample, time, the net's own keys and values, embedded picture → residuals |
| controlnet_kv        | text states → the net's own keys and values |
| controlnet_hint      | control pictures → hint, added after the net's first layer |
| controlnet_condition | SDXL's nets: pooled text and sizes → a vector added to the embedded time |

A union net's step also takes the kinds of control that are present. Its hint also takes each picture's kind and weight,
and fuses all pictures into one hint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from scumble_build.export.denoiser import level_axes, level_dims
from scumble_build.export.graph import PRECISIONS, Graph
from scumble_build.export.manifest import FLOAT, Axis, GraphPart, Port, Precision
from scumble_build.export.pictures import pixel_axes
from scumble_build.export.plan import kept_in_fp32
from scumble_build.export.ports import HEIGHT, MASK, ROWS, SIZES, TIMESTEP, TOKENS, WIDTH, kv_port
from scumble_build.graphs.controlnet import ControlledEncoder, ControlNet, ControlNetUnion
from scumble_build.graphs.inputs import NetInputs

_PICTURES = Axis(min=1, opt=1, max=8, about="Control pictures of a call.")


@dataclass(frozen=True, slots=True)
class NetGraphs:
    """A net's graphs in `precision`. `states["controlnet"]` has its tensors by the names in its file."""

    net: ControlNet | ControlNetUnion
    states: Mapping[str, Mapping[str, Tensor]]
    precision: Precision

    @classmethod
    def of(cls, model: Any, precision: Precision) -> NetGraphs:
        """Make a net's graphs from diffusers' ControlNetModel or ControlNetUnionModel, which is changed in place."""
        model.to(PRECISIONS[precision]).eval().requires_grad_(requires_grad=False)
        states = {"controlnet": dict(model.state_dict())}
        union = hasattr(model, "task_embedding")
        return cls(ControlNetUnion(model) if union else ControlNet(model), states, precision)

    @property
    def names(self) -> tuple[str, ...]:
        reads_sizes = self._config.addition_embed_type == "text_time"
        more = ("controlnet_condition",) if reads_sizes else ()
        return ("controlnet", "controlnet_kv", "controlnet_hint", *more)

    def graph_state(self, _name: str) -> Mapping[str, Tensor]:
        """Return the tensors of a graph's component, the net."""
        return self.states["controlnet"]

    def config(self, _name: str) -> dict[str, Any]:
        """Return the config that, with the code, decides a graph's structure."""
        return {key: value for key, value in self._config.items() if not key.startswith("_")}

    def graph(self, name: str) -> Graph:
        """Return one of `names`."""
        makers = {
            "controlnet": self._step,
            "controlnet_kv": self._keys_and_values,
            "controlnet_hint": self._hint,
            "controlnet_condition": self._condition,
        }
        return makers[name]()

    @property
    def _config(self) -> Any:
        return self.net.model.config

    @property
    def _union(self) -> bool:
        return isinstance(self.net, ControlNetUnion)

    def _step(self) -> Graph:
        config, dtype = self._config, FLOAT[self.precision]
        widths = [int(width) for width in config.block_out_channels]
        inputs = [
            _sample("sample", int(config.in_channels), "float32", "Latents, scaled for their timestep."),
            TIMESTEP,
            kv_port(self.net.projection.slices, dtype),
            MASK,
            _sample("hint", widths[0], dtype, "Output of controlnet_hint for the control picture."),
        ]
        if config.addition_embed_type == "text_time":
            about = "Output of controlnet_condition for pooled text and sizes."
            inputs.append(Port(name="added", dtype=dtype, dims=("rows", self._time_width), about=about))
        if self._union:
            about = "1 for each kind of control that is present, else 0."
            kinds = int(config.num_control_type)
            inputs.append(Port(name="kinds", dtype="float32", dims=(kinds,), about=about))
        places = [(widths[0], 0)]
        for level, width in enumerate(widths):
            places += [(width, level)] * int(config.layers_per_block)
            places += [(width, level + 1)] if level + 1 < len(widths) else []
        places.append((widths[-1], len(widths) - 1))
        outputs = tuple(
            Port(
                name=f"residual_{i}",
                dtype=dtype,
                dims=("rows", channels, *level_dims(level)),
                about="Unscaled residual of a skip connection; the last is the middle block's.",
            )
            for i, (channels, level) in enumerate(places)
        )
        named = {dim for port in outputs for dim in port.dims if isinstance(dim, str)}
        axes = {"rows": ROWS, "tokens": TOKENS, "height": HEIGHT, "width": WIDTH, **level_axes(len(widths), named)}
        in_fp32 = kept_in_fp32(self._config) if self.precision != "fp32" else ()
        return self._made("controlnet", _Step(self.net), tuple(inputs), outputs, axes, len(widths), in_fp32)

    def _keys_and_values(self) -> Graph:
        slices, dtype = self.net.projection.slices, FLOAT[self.precision]
        (width,) = {target.fan_in for target in self.net.projection.layout.targets.values()}
        about = "Text states of the base's encoders, without UNet LoRAs."
        states = Port(name="states", dtype=dtype, dims=("rows", "tokens", width), about=about)
        axes = {"rows": ROWS, "tokens": TOKENS}
        return self._made("controlnet_kv", _KeysAndValues(self.net), (states,), (kv_port(slices, dtype),), axes)

    def _hint(self) -> Graph:
        channels, dtype = int(self._config.conditioning_channels), FLOAT[self.precision]
        dims = ("rows", channels, "pixel_height", "pixel_width")
        inputs = [Port(name="control", dtype="float32", dims=dims, about="Control pictures in 0…1, RGB.")]
        if self._union:
            inputs += [
                Port(name="kinds", dtype="int64", dims=("rows",), about="Each picture's kind of control."),
                Port(name="strength", dtype=dtype, dims=("rows",), about="Weight of each picture."),
            ]
        hint = _sample("hint", int(self._config.block_out_channels[0]), dtype, "Input of `controlnet`.")
        out = hint.model_copy(update={"dims": (1, *hint.dims[1:])}) if self._union else hint
        axes = {"rows": _PICTURES, **pixel_axes(8), "height": HEIGHT, "width": WIDTH}
        module: nn.Module = _Fused(self.net) if isinstance(self.net, ControlNetUnion) else _Hint(self.net)
        return self._made("controlnet_hint", module, tuple(inputs), (out,), axes)

    def _condition(self) -> Graph:
        dtype = FLOAT[self.precision]
        added: Any = self.net.model.add_embedding
        width = int(added.linear_1.in_features) - 6 * int(self._config.addition_time_embed_dim)
        pooled = Port(name="pooled", dtype=dtype, dims=("rows", width), about="The pooled text.")
        out = Port(name="added", dtype=dtype, dims=("rows", self._time_width), about="Input of `controlnet`.")
        return self._made("controlnet_condition", _Condition(self.net), (pooled, SIZES), (out,), {"rows": ROWS})

    def _made(
        self,
        part: GraphPart,
        module: nn.Module,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        axes: Mapping[str, Axis],
        levels: int = 0,
        in_fp32: tuple[str, ...] = (),
    ) -> Graph:
        parameters = {f"controlnet.{name}": tensor for name, tensor in self.states["controlnet"].items()}
        return Graph(
            part, part, module, inputs, outputs, axes, self.precision, parameters, levels=levels, kept_in_fp32=in_fp32
        )

    @property
    def _time_width(self) -> int:
        embedding: Any = self.net.model.time_embedding
        return int(embedding.linear_2.out_features)


def _sample(name: str, channels: int, dtype: Any, about: str) -> Port:
    return Port(name=name, dtype=dtype, dims=("rows", channels, "height", "width"), about=about)


class _Step(nn.Module):
    def __init__(self, net: ControlNet | ControlNetUnion) -> None:
        super().__init__()
        self.net = net
        self.conditioned = net.model.config.addition_embed_type == "text_time"

    def forward(
        self, sample: Tensor, timestep: Tensor, kv: Tensor, kv_mask: Tensor, hint: Tensor, *more: Tensor
    ) -> tuple[Tensor, ...]:
        rest = iter(more)
        inputs = NetInputs(kv, hint, next(rest) if self.conditioned else None, kv_mask)
        sample = sample.to(kv.dtype)
        if isinstance(self.net, ControlNetUnion):
            return self.net.residuals_of(next(rest), sample, timestep, inputs)
        return self.net.residuals(sample, timestep, inputs)


class _KeysAndValues(nn.Module):
    def __init__(self, net: ControlledEncoder) -> None:
        super().__init__()
        self.net = net

    def forward(self, states: Tensor) -> Tensor:
        return self.net.project(states)


class _Hint(nn.Module):
    def __init__(self, net: ControlledEncoder) -> None:
        super().__init__()
        self.net = net

    def forward(self, control: Tensor) -> Tensor:
        conv_in: Any = self.net.model.conv_in
        return self.net.embed(control.to(conv_in.weight.dtype))


class _Fused(nn.Module):
    def __init__(self, net: ControlNetUnion) -> None:
        super().__init__()
        self.net = net

    def forward(self, control: Tensor, kinds: Tensor, strength: Tensor) -> Tensor:
        return self.net.fused(control.to(strength.dtype), kinds, strength)


class _Condition(nn.Module):
    def __init__(self, net: ControlledEncoder) -> None:
        super().__init__()
        self.net = net

    def forward(self, pooled: Tensor, sizes: Tensor) -> Tensor:
        added = self.net.condition(pooled, sizes)
        assert added is not None
        return added
