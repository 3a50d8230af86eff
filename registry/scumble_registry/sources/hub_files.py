"""Choose the needed files of a Hub repository, which may hold several formats and precisions, and other files.

a file                  that file
model_index.json        a pipeline: for each component its texts and the best of its weights
config.json             one model: its texts and the best of its weights
adapter_config.json     a PEFT folder: the same
else                    the only file of weights; several are refused
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

from scumble.errors import InvalidRequest, NotFound

_TEXTS = (".json", ".txt", ".model")
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
"""Endings of weights, the best first."""
_CANONICAL = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model|adapter_model)(?:\.(?P<variant>[a-z0-9_]+?))?"
    r"(?P<shard>-\d{5}-of-\d{5})?(?P<ending>\.safetensors|\.bin)"
)
_HALF = ("fp16", "bf16")
_MOST_LISTED = 12


def choose(names: Collection[str], path: str, include: Collection[str] = ()) -> list[str]:
    """Return the needed files of a repository, sorted.

    `path` is a file or folder of it (empty: all). `include` are patterns (`*.safetensors`) of names inside the folder,
    which replace the choice. Raises NotFound, and InvalidRequest listing the files to choose from.
    """
    if path in names:
        return [path]
    start = f"{path}/" if path else ""
    inside = {name.removeprefix(start) for name in names if name.startswith(start) and not _hidden(name)}
    if not inside:
        raise NotFound(f"the repository has no {path!r}; it has {_list(names)}", path=path)
    if include:
        chosen = {name for name in inside if any(fnmatchcase(name, pattern) for pattern in include)}
        if not chosen:
            raise NotFound(f"nothing matches {', '.join(include)}; there are {_list(inside)}")
    else:
        chosen = _needed(inside)
    return sorted(start + name for name in chosen)


def _needed(names: set[str]) -> set[str]:
    if "model_index.json" in names:
        components = {name.partition("/")[0] for name in names if name.count("/") == 1}
        models = [{name for name in names if name.startswith(f"{component}/")} for component in components]
        parts = [part for model in models if (part := _model(model))]
        return {"model_index.json"}.union(*parts)
    if {"config.json", "adapter_config.json"} & names:
        adapter = _model({name for name in names if "/" not in name})
        encoder = _model({name for name in names if name.startswith("image_encoder/") and name.count("/") == 1})
        return adapter | encoder
    weights = sorted(name for name in names if name.endswith(_ENDINGS))
    best = [name for name in weights if name.endswith(".safetensors")] or weights
    if len(best) != 1:
        raise InvalidRequest(
            f"the repository has {len(best)} files of weights; name one, as hf:owner/repo/file: {_list(best)}"
            if best
            else f"the repository has no file of weights; it has {_list(names)}",
            field="source",
        )
    return set(best)


def _model(names: set[str]) -> set[str]:
    """Return a folder's texts and the best of its weights: safetensors before others, full precision before half."""
    texts = {name for name in names if name.endswith(_TEXTS) and not name.endswith(".index.json")}
    matches = {name: match for name in names if (match := _CANONICAL.fullmatch(name.rpartition("/")[2]))}
    if not matches:
        others = sorted(name for name in names if name.endswith(_ENDINGS))
        return texts | set([name for name in others if name.endswith(".safetensors")] or others)
    for ending in (".safetensors", ".bin"):
        for variant in (None, *_HALF):
            weights = {
                name for name, match in matches.items() if match["ending"] == ending and match["variant"] == variant
            }
            if weights:
                whole = {name for name in weights if not matches[name]["shard"]}
                return texts | (whole or weights)
    return texts | set(matches)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _list(names: Collection[str]) -> str:
    first = sorted(names)[:_MOST_LISTED]
    return ", ".join(first) + (f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else "")
