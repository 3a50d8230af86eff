"""Training metadata in the header of a safetensors file: kohya's `ss_…` and the model spec's `modelspec.…`.

It is untrusted text, and only `inspect` and the manifest show it; images in it may be megabytes. `read` limits it.
`for_manifest` selects the part that a manifest holds: what people search a LoRA by, and no paths of the trainer's disk.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scumble.errors import Refused
from scumble_registry.formats.safetensors_header import read_header

_PREFIXES = ("ss_", "sshs_", "modelspec.")
_PICTURES = frozenset({"modelspec.thumbnail", "ssmd_cover_images"})
_MOST, _MOST_CHARACTERS, _MOST_TAGS = 200, 2000, 20
_TAGS = "ss_tag_frequency"

_IN_MANIFEST = (
    "modelspec.architecture",
    "modelspec.author",
    "modelspec.date",
    "modelspec.license",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "modelspec.title",
    "modelspec.trigger_phrase",
    "modelspec.usage_hint",
    "ss_base_model_version",
    "ss_clip_skip",
    "ss_epoch",
    "ss_learning_rate",
    "ss_network_alpha",
    "ss_network_args",
    "ss_network_dim",
    "ss_network_module",
    "ss_num_train_images",
    "ss_optimizer",
    "ss_output_name",
    "ss_resolution",
    "ss_sd_model_hash",
    "ss_sd_model_name",
    "ss_steps",
    "ss_v2",
)
_MAX_MANIFEST_CHARACTERS = 300


def read(weights: Mapping[str, Path]) -> dict[str, Any]:
    """Return key → text, cut where it is long; of the tags, the most frequent with their counts.

    Empty for files that are not safetensors, and for models of several files.
    """
    if len(weights) != 1:
        return {}
    try:
        (file,) = weights.values()
        metadata = {_sound(name): _sound(text) for name, text in read_header(file).metadata.items()}
    except Refused:
        return {}
    names = [name for name in sorted(metadata) if name.startswith(_PREFIXES)]
    return {name: _value(name, metadata[name]) for name in names[:_MOST] if name not in _PICTURES}


def for_manifest(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of `read` that a manifest holds."""
    texts = {name: str(training.get(name, "")) for name in _IN_MANIFEST}
    short = {name: text[:_MAX_MANIFEST_CHARACTERS] for name, text in texts.items() if text not in {"", "None"}}
    tags = training.get(_TAGS)
    return short | ({_TAGS: tags} if isinstance(tags, dict) and tags else {})


def _sound(text: str) -> str:
    """Replace lone surrogates, which JSON can encode but UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _value(name: str, text: str) -> Any:
    if name != _TAGS:
        return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "…"
    return frequent_tags(text)


def frequent_tags(text: str) -> dict[str, int]:
    """Sum kohya's tag frequencies (JSON: folder → tag → count) over all folders, the most frequent first."""
    try:
        folders = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if type(count) is int and 0 < count < 2**31 and 0 < len(tag.strip()) <= 100:
                counts[_sound(tag.strip())] += count
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return dict(ranked[:_MOST_TAGS])
