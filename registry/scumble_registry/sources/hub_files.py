"""Which files of a Hub repository are needed: people put every format, precision and picture beside each other.

a file                  that file
model_index.json        a pipeline: for each component its texts and the best of its weights
config.json             one model: likewise
adapter_config.json     PEFT's folder
else                    the only file of weights; of several, nobody can know which was meant
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

from scumble.errors import InvalidRequest, NotFound

_TEXTS = (".json", ".txt", ".model")
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
"""Of weights, the best first."""
_CANONICAL = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model|adapter_model)(?:\.(?P<variant>[a-z0-9_]+?))?"
    r"(?P<shard>-\d{5}-of-\d{5})?(?P<ending>\.safetensors|\.bin)"
)
_HALF = ("fp16", "bf16")
_SHOWN = 12


def choose(names: Collection[str], path: str, include: Collection[str] = ()) -> list[str]:
    """The needed ones of a repository's files, sorted; `path` is a file or folder of it (empty: all), `include` are
    patterns (`*.safetensors`) of names inside the folder, which then alone decide.

    Raises NotFound, and InvalidRequest listing what there is to choose from.
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
            f"the repository has {len(best)} files of weights; say which, as hf:owner/repo/file: {_list(best)}"
            if best
            else f"the repository has no file of weights; it has {_list(names)}",
            field="source",
        )
    return set(best)


def _model(names: set[str]) -> set[str]:
    """One folder's texts and the best of its weights: safetensors before others, whole precision before half."""
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
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
