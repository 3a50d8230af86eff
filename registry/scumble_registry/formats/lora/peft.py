"""Read ranks and alphas from PEFT's configs: in the header of diffusers' files, in a file of PEFT's folders.

diffusers puts a JSON object into the header's `lora_adapter_metadata`, LoraConfig's fields with each component's prefix
(`unet.r`, `unet.lora_alpha`, `unet.rank_pattern`, `unet.alpha_pattern`, `unet.use_rslora`). Without it: scale 1. A PEFT
folder has `adapter_config.json` for its one component, whose `peft_type` is the algorithm of its tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scumble.errors import Refused

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_SERVED = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
_MAX_PATTERN = 512
_MAX_REPEATS = 2
_MAX_TERMS = 50


@dataclass(frozen=True, slots=True)
class Scaling:
    """Ranks, alphas and options of one component."""

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    feedforward: tuple[str, ...] | str = ()
    """For IA³: modules whose input is scaled, by the end of their names, or as one regular expression."""
    neumann_terms: int = 0
    """For OFT: number of terms of the series that replaces Cayley's transform; 0: the transform itself."""

    def rank_of(self, module: str) -> int | None:
        """Return the rank by the config; None without one."""
        rank: int | None = match_pattern(self.rank_pattern, module, self.rank)
        return rank

    def reads_input(self, module: str) -> bool:
        if isinstance(self.feedforward, str):
            return re.fullmatch(self.feedforward, module) is not None
        return any(f".{module}".endswith(f".{name}") for name in self.feedforward)

    def alpha_of(self, module: str, rank: int) -> float | None:
        """Return α such that the scale is α/rank; None without metadata. Raises Refused if the rank disagrees."""
        stated = self.rank_of(module)
        if stated is not None and stated != rank:
            raise Refused(f"{module}: the metadata has rank {stated}, but the tensors have rank {rank}")
        alpha: float | None = match_pattern(self.alpha_pattern, module, self.alpha)
        if alpha == 0:
            raise Refused(f"{module}: lora_alpha is 0, which switches the adapter off; set it and save again")
        return alpha * math.sqrt(rank) if alpha is not None and self.rank_stabilised else alpha


def parse_metadata(metadata: dict[str, str]) -> dict[str, Scaling]:
    """Return the scaling of each component; no metadata means scale 1 everywhere. Raises Refused."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    except (ValueError, RecursionError) as error:
        raise Refused(f"the header's lora_adapter_metadata is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise Refused("the header's lora_adapter_metadata is not a JSON object")
    return {name: _scaling(config, f"{name}.") for name in _COMPONENTS}


def parse_config(config: object) -> Scaling:
    """Read a PEFT folder's config. Raises Refused for a `peft_type` or an option that cannot be served."""
    if not isinstance(config, dict):
        raise Refused("adapter_config.json is not a JSON object")
    kind = config.get("peft_type")
    if kind not in _SERVED:
        raise Refused(f"adapter_config.json has peft_type {kind!r}; {', '.join(_SERVED)} can be served", peft_type=kind)
    for option in ("fan_in_fan_out", "coft"):
        if config.get(option):
            raise Refused(f"adapter_config.json sets {option}, which cannot be served", option=option)
    if kind in {"LOHA", "LOKR"}:
        config = {**config, "lora_alpha": config.get("alpha")}
    if kind in {"OFT", "BOFT", "IA3"}:
        config = {key: config[key] for key in config if key not in {"r", "rank_pattern", "alpha_pattern"}}
    return _scaling(config, "")


def match_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the whole name, or its end after a dot: PEFT's rule."""
    spellings = {module, module.removeprefix("text_model."), f"text_model.{module}"}
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in spellings):
            return value
    return default


def _scaling(config: dict[str, Any], prefix: str) -> Scaling:
    def of(name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = config.get(f"{prefix}{name}")
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise Refused(f"{where} has {prefix}{name} = {value!r}, which is of the wrong type")
        return value

    where = "lora_adapter_metadata" if prefix else "adapter_config.json"

    patterns = {name: of(f"{name}_pattern", dict, default={}) for name in ("rank", "alpha")}
    for pattern, value in [item for mapping in patterns.values() for item in mapping.items()]:
        _check_pattern(pattern, value)
    return Scaling(
        rank=of("r", int, default=None),
        alpha=of("lora_alpha", (int, float), default=None),
        rank_pattern=patterns["rank"],
        alpha_pattern=patterns["alpha"],
        rank_stabilised=of("use_rslora", bool, default=False),
        feedforward=_feedforward(of("feedforward_modules", (list, str), default=[])),
        neumann_terms=_terms(of("num_cayley_neumann_terms", int, default=5))
        if of("use_cayley_neumann", bool, default=False)
        else 0,
    )


def _terms(count: int) -> int:
    if not 1 <= count <= _MAX_TERMS:
        raise Refused(f"adapter_config.json has num_cayley_neumann_terms = {count}; it may be 1 to {_MAX_TERMS}")
    return count


def _feedforward(names: list[Any] | str) -> tuple[str, ...] | str:
    if isinstance(names, str):
        _check_pattern(names, 0)
        return names
    if not all(isinstance(name, str) for name in names):
        raise Refused("adapter_config.json has feedforward_modules that are not names")
    return tuple(names)


def _check_pattern(pattern: str, value: Any) -> None:
    """Check an untrusted pattern: it must match in little time, and its value must be a number. Raises Refused."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(f"pattern {pattern!r} gives {value!r}, not a number")
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if len(pattern) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+?{]|\\[1-9]", pattern):
        raise Refused(f"pattern {pattern[:80]!r} is too complex; name the modules instead")
    try:
        re.compile(pattern)
    except re.error as error:
        raise Refused(f"pattern {pattern!r} is no regular expression: {error}") from error
