"""The diffusers/PEFT layout: `unet.<module>.lora_A.weight` (down), `….lora_B.weight` (up), `text_encoder.…`; a DoRA
has `….lora_magnitude_vector[.weight]` too.

alpha stands in the header's `lora_adapter_metadata`, a JSON object of LoraConfig's fields with each component's prefix
(`unet.r`, `unet.lora_alpha`, `unet.rank_pattern`, `unet.alpha_pattern`, `unet.use_rslora`). Without it: scale 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scumble.errors import Refused
from scumble_registry.formats.base import canonical_name
from scumble_registry.formats.lora.leftover import refuse_leftover
from scumble_registry.formats.lora.record import LoraRecord, make_module, read_magnitude
from scumble_registry.formats.safetensors_header import Array

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_MAX_PATTERN = 512
_MAX_REPEATS = 2


@dataclass(frozen=True, slots=True)
class Scaling:
    """One component's part of the metadata."""

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def alpha_of(self, module: str, rank: int) -> float | None:
        """alpha such that the scale is alpha/rank; None without metadata. Raises Refused if the rank
        disagrees.
        """
        said = match_pattern(self.rank_pattern, module, self.rank)
        if said is not None and said != rank:
            raise Refused(f"{module}: the metadata says rank {said}, the tensors have rank {rank}")
        alpha: float | None = match_pattern(self.alpha_pattern, module, self.alpha)
        if alpha == 0:
            raise Refused(f"{module}: lora_alpha is 0, which switches the adapter off; set it and save again")
        return alpha * math.sqrt(rank) if alpha is not None and self.rank_stabilised else alpha


def parse(tensors: Mapping[str, Array], metadata: dict[str, str]) -> LoraRecord:
    """Raises Refused listing every key that is not understood."""
    scalings = parse_metadata(metadata)
    record: LoraRecord = {}
    used: set[str] = set()
    for name in sorted(tensors):
        component, _, rest = name.removesuffix(_DOWN).partition(".")
        up = f"{component}.{rest}{_UP}"
        if not name.endswith(_DOWN) or component not in _COMPONENTS or up not in tensors:
            continue
        target = canonical_name(f"{component}.{rest}")
        if target in record:
            raise Refused(f"{target} stands in the file twice, with and without text_model", target=target)
        down = tensors[name]
        lengths = next((key for end in _MAGNITUDES if (key := f"{component}.{rest}{end}") in tensors), None)
        alpha = scalings[component].alpha_of(rest, down.shape[0]) if down.ndim else None
        magnitude = (
            None if lengths is None else read_magnitude(target, tensors[lengths], tensors[up], down, convolution_axis=0)
        )
        record[target] = make_module(target, down, tensors[up], alpha, magnitude)
        used |= {name, up, lengths or name}
    refuse_leftover(tensors.keys() - used, hint="or are no pair of lora_A and lora_B of unet or text_encoder")
    return dict(sorted(record.items()))


def parse_metadata(metadata: dict[str, str]) -> dict[str, Scaling]:
    """Scaling of each component; no metadata means scale 1 everywhere."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    except (ValueError, RecursionError) as error:
        raise Refused(f"the header's lora_adapter_metadata is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise Refused("the header's lora_adapter_metadata is not a JSON object")
    return {name: _scaling(config, name) for name in _COMPONENTS}


def match_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the whole name, or the end of it after a dot."""
    spellings = {module, module.removeprefix("text_model."), f"text_model.{module}"}
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in spellings):
            return value
    return default


def _scaling(config: dict[str, Any], component: str) -> Scaling:
    def of(name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = config.get(f"{component}.{name}")
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise Refused(f"lora_adapter_metadata says {component}.{name} = {value!r}, which is of the wrong type")
        return value

    patterns = {name: of(f"{name}_pattern", dict, default={}) for name in ("rank", "alpha")}
    for pattern, value in [item for mapping in patterns.values() for item in mapping.items()]:
        _check_pattern(pattern, value)
    return Scaling(
        rank=of("r", int, default=None),
        alpha=of("lora_alpha", (int, float), default=None),
        rank_pattern=patterns["rank"],
        alpha_pattern=patterns["alpha"],
        rank_stabilised=of("use_rslora", bool, default=False),
    )


def _check_pattern(pattern: str, value: Any) -> None:
    """Patterns come from strangers: none may take long to match, and each gives a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(f"pattern {pattern!r} in lora_adapter_metadata gives {value!r}, not a number")
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if len(pattern) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+?{]|\\[1-9]", pattern):
        raise Refused(f"pattern {pattern[:80]!r} in lora_adapter_metadata is too involved; name the modules instead")
    try:
        re.compile(pattern)
    except re.error as error:
        raise Refused(f"pattern {pattern!r} in lora_adapter_metadata is no regular expression: {error}") from error
