"""Hypernetworks that read an image or a text and predict a LoRA (after HyperDreamBooth, Ruiz et al., 2307.06949).

One safetensors file, which trainers write and the server reads. Its header holds `scumble.predictor`, a JSON object:

| field       | meaning                                                                                              |
|-------------|------------------------------------------------------------------------------------------------------|
| `condition` | `image`: penultimate hidden states of the base's image encoder; `text`: last ones of its text encoder |
| `encoder`   | sha256 of that encoder's weights file, `sha256:…`, or null                                           |
| `width`     | of the decoder's states; `heads` divides it                                                          |
| `depth`     | layers of the decoder                                                                                |
| `passes`    | number of runs, each with the last coefficients fed back (about four in the paper)                   |
| `rank`      | r of the predicted factors                                                                           |
| `a`, `b`    | sizes of the predicted A (a, r) and B (r, b) of each target                                          |
| `alpha`     | of the predicted LoRA                                                                                |
| `targets`   | canonical name of each target (a linear layer or a 1x1 convolution), in the order of the queries     |

With T targets, D the width, C the condition's width and n = r (a + b), its tensors are

    condition.weight (D, C), condition.bias     queries (T, D)     feedback.weight (D, n), feedback.bias
    head.weight (n, D), head.bias               decoder.…          as torch.nn.TransformerDecoder names them
    aux.<target>.up (out, a)                    aux.<target>.down (b, in)

and the prediction for a target, from coefficients c (n,) = (A row by row, then B row by row), is

    ΔW = alpha / r · up @ down        up = aux.up @ A  (out, r)        down = B @ aux.down  (r, in)

The auxiliaries are random and frozen. They are stored rather than generated from a seed, as random generators and
orthogonal decompositions differ between versions and machines. The record is the same file in canonical form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scumble.errors import Refused
from scumble_registry.compatibility import Family, LoraCompatibility, Shape, WeightPredictor
from scumble_registry.formats.safetensors_header import Array, Header, write
from scumble_registry.formats.unknown_keys import refuse_unknown_keys

CONFIG = "scumble.predictor"
FORMAT = "scumble.hypernetwork.predictor.1"
FEED_FORWARD = 4
"""Width of the decoder's feed-forward layers, as a multiple of `width`."""

_MAX_SCALE = 1e3
_FAMILIES: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_Size: TypeAlias = Annotated[int, Field(ge=1, le=8192)]


class PredictorConfig(BaseModel):
    """The header's description of a predictor."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    condition: Literal["image", "text"]
    encoder: Annotated[str, Field(pattern=r"sha256:[0-9a-f]{64}")] | None = None
    width: _Size
    heads: Annotated[int, Field(ge=1, le=256)]
    depth: Annotated[int, Field(ge=1, le=64)]
    passes: Annotated[int, Field(ge=1, le=16)]
    rank: Annotated[int, Field(ge=1, le=256)]
    a: _Size
    b: _Size
    alpha: float
    targets: Annotated[list[str], Field(min_length=1, max_length=2000)]

    @model_validator(mode="after")
    def _agree(self) -> PredictorConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError("a target is named twice")
        if not isfinite(self.alpha) or not 0 < abs(self.alpha) / self.rank <= _MAX_SCALE:
            raise ValueError(f"alpha / rank must be within ±{_MAX_SCALE:g}, not 0")
        return self

    @property
    def coefficients(self) -> int:
        """n, the number of coefficients for each target."""
        return self.rank * (self.a + self.b)

    def network_shapes(self, condition_width: int) -> dict[str, Shape]:
        """Return the shape of every tensor but the auxiliaries."""
        width, n = self.width, self.coefficients
        shapes: dict[str, Shape] = {"queries": (len(self.targets), width)}
        for name, out, in_ in (
            ("condition", width, condition_width),
            ("feedback", width, n),
            ("head", n, width),
        ):
            shapes |= {f"{name}.weight": (out, in_), f"{name}.bias": (out,)}
        for layer in range(self.depth):
            shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in _decoder_layer(width).items()}
        return shapes | {"decoder.norm.weight": (width,), "decoder.norm.bias": (width,)}


@dataclass(frozen=True, slots=True, eq=False)
class PredictorRecord:
    """A predictor: `network` has every tensor but the auxiliaries, which are `up` and `down` by target."""

    config: PredictorConfig
    network: dict[str, Array]
    up: dict[str, Array]
    down: dict[str, Array]

    @property
    def condition_width(self) -> int:
        return int(self.network["condition.weight"].shape[1])

    @property
    def values(self) -> int:
        """Number of parameters."""
        return sum(array.size for array in (*self.network.values(), *self.up.values(), *self.down.values()))


def recognises(header: Header) -> bool:
    return CONFIG in header.metadata


def unknown_keys(_: Header) -> set[str]:
    """Return an empty set: no key may be left out, and `parse` refuses unknown ones."""
    return set()


def parse(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[bytes, WeightPredictor, Family | None]:
    """Return record, compatibility and family. Raises Refused, naming the tensor or the field that is wrong."""
    record = make_record(tensors, _config(metadata[CONFIG]))
    requires: dict[str, Shape] = {
        name: (len(record.up[name]), int(record.down[name].shape[1])) for name in sorted(record.up)
    }
    family = next((_FAMILIES.get(shape[1]) for name, shape in requires.items() if _reads_text(name)), None)
    compatibility = WeightPredictor(
        condition=record.config.condition,
        condition_width=record.condition_width,
        encoder=record.config.encoder,
        lora=LoraCompatibility(family=family, requires=requires, ranks=dict.fromkeys(requires, record.config.rank)),
    )
    return write_record(record), compatibility, family


def make_record(tensors: Mapping[str, Array], config: PredictorConfig) -> PredictorRecord:
    """Check the tensors and return a record. Raises Refused."""
    up = {name: _tensor(tensors, f"aux.{name}.up", (None, config.a)) for name in config.targets}
    down = {name: _tensor(tensors, f"aux.{name}.down", (config.b, None)) for name in config.targets}
    condition_width = _tensor(tensors, "condition.weight", (config.width, None)).shape[1]
    shapes = config.network_shapes(condition_width)
    network = {name: _tensor(tensors, name, shape) for name, shape in shapes.items()}
    known = network.keys() | {f"aux.{name}.{side}" for name in config.targets for side in ("up", "down")}
    refuse_unknown_keys(tensors.keys() - known, "beside the predictor that the header describes")
    return PredictorRecord(config, network, up, down)


def write_record(record: PredictorRecord) -> bytes:
    """Return a record's bytes, which can be published as a file. Equal records have equal bytes."""
    aux = {f"aux.{name}.up": values for name, values in record.up.items()}
    aux |= {f"aux.{name}.down": values for name, values in record.down.items()}
    config = json.dumps(record.config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return write(record.network | aux, {"format": FORMAT, CONFIG: config})


def read(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> PredictorRecord:
    """Read a record. Raises KeyError or Refused if this is no record."""
    if metadata["format"] != FORMAT:
        raise Refused(f"its format is {metadata['format']!r}, not {FORMAT}")
    return make_record(tensors, _config(metadata[CONFIG]))


def _config(text: str) -> PredictorConfig:
    try:
        return PredictorConfig.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise Refused(f"the header's {CONFIG} is not usable: {problems}") from error


def _tensor(tensors: Mapping[str, Array], name: str, shape: tuple[int | None, ...]) -> Array:
    """Return a tensor after checking its shape, in which None is any size but 0. Raises Refused."""
    if name not in tensors:
        raise Refused(f"{name} is missing, though the header's {CONFIG} describes it", tensor=name)
    values = tensors[name]
    fits = len(values.shape) == len(shape) and all(
        size == expected if expected is not None else size > 0
        for size, expected in zip(values.shape, shape, strict=True)
    )
    if not fits:
        expected_shape = ", ".join("any" if size is None else str(size) for size in shape)
        raise Refused(
            f"{name} has shape {values.shape}; by the header's {CONFIG} it is ({expected_shape})", tensor=name
        )
    return values


def _decoder_layer(width: int) -> dict[str, Shape]:
    """Return the shapes of a torch.nn.TransformerDecoderLayer."""
    shapes: dict[str, Shape] = {}
    for attention in ("self_attn", "multihead_attn"):
        shapes |= {
            f"{attention}.in_proj_weight": (3 * width, width),
            f"{attention}.in_proj_bias": (3 * width,),
            f"{attention}.out_proj.weight": (width, width),
            f"{attention}.out_proj.bias": (width,),
        }
    hidden = FEED_FORWARD * width
    shapes |= {"linear1.weight": (hidden, width), "linear1.bias": (hidden,)}
    shapes |= {"linear2.weight": (width, hidden), "linear2.bias": (width,)}
    for norm in ("norm1", "norm2", "norm3"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return shapes


def _reads_text(target: str) -> bool:
    return target.startswith("unet.") and target.endswith((".attn2.to_k", ".attn2.to_v"))


__all__ = ["CONFIG", "PredictorConfig", "PredictorRecord", "make_record", "parse", "read", "recognises", "write_record"]
