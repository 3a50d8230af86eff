"""The sampling of few-step LoRAs, as their authors published it.

Their tensors do not differ from those of other LoRAs, so they are recognised by name: in the header (`ss_output_name`,
`modelspec.title`) or the file's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from scumble_registry.manifest import Sampling

_STEPS = re.compile(r"(?<!\d)([1-9]|1[0-6])[ _-]?steps?")


def sampling_of(metadata: Mapping[str, str], file_name: str) -> Sampling | None:
    """Return the sampling of a known few-step LoRA, else None.

    >>> sampling_of({}, "sdxl_lightning_4step_lora.safetensors").steps
    4
    """
    names = (metadata.get("ss_output_name", ""), metadata.get("modelspec.title", ""), file_name)
    return next((sampling for name in names if (sampling := _of_name(name.lower()[:200])) is not None), None)


def _of_name(name: str) -> Sampling | None:
    words = set(re.findall(r"[a-z]+", name))
    steps = _STEPS.search(name)
    return next(
        (make(words, int(steps[1]) if steps else None) for word, make in _MAKERS.items() if word in words), None
    )


def _lcm(words: set[str], steps: int | None) -> Sampling | None:
    """Return LCM-LoRA's (Luo et al., 2311.05556); `lcm` alone may also be the name of a style."""
    known = words & {"lora", "weights"}
    return Sampling(scheduler="lcm", steps=steps or 4, guidance_scale=1.0, eta=None) if known else None


def _dmd(_words: set[str], steps: int | None) -> Sampling | None:
    """Return DMD2's (Yin et al., 2405.14867)."""
    return Sampling(scheduler="lcm", steps=steps or 4, guidance_scale=1.0, eta=None)


def _lightning(_words: set[str], steps: int | None) -> Sampling | None:
    """Return SDXL-Lightning's (Lin et al., 2402.13929): one file for each number of steps."""
    if steps is None or steps == 1:
        return None
    return Sampling(scheduler="euler", steps=steps, guidance_scale=1.0, timestep_spacing="trailing", eta=None)


def _tcd(_words: set[str], steps: int | None) -> Sampling | None:
    """Return TCD's (Zheng et al., 2402.19159)."""
    return Sampling(scheduler="tcd", steps=steps or 4, guidance_scale=1.0, eta=0.3)


def _hyper(words: set[str], steps: int | None) -> Sampling | None:
    """Return Hyper-SD's (Ren et al., 2404.13686): one file for each number of steps; `cfg` marks guidance."""
    if steps is None or not words & {"sd", "sdxl"}:
        return None
    if steps == 1:
        return Sampling(scheduler="tcd", steps=1, guidance_scale=1.0, eta=1.0)
    guidance = None if "cfg" in words else 1.0
    return Sampling(scheduler="ddim", steps=steps, guidance_scale=guidance, timestep_spacing="trailing", eta=None)


_MAKERS: dict[str, Callable[[set[str], int | None], Sampling | None]] = {
    "lcm": _lcm,
    "dmd": _dmd,
    "lightning": _lightning,
    "tcd": _tcd,
    "hyper": _hyper,
}
