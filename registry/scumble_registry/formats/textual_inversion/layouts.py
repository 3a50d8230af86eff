"""Recognise the layout of an embedding's file, and the text encoder of each of its tensors.

| layout            | keys                                        | token                           |
|-------------------|---------------------------------------------|---------------------------------|
| diffusers         | exactly one, (n, D) or (D,)                 | the key                         |
| kohya, the webui  | `emb_params` (n, D); `clip_l` alone too     | the file's name without ending  |
| SDXL              | `clip_l` (n, D) and `clip_g` (n, D')        | the file's name without ending  |
| SDXL, diffusers   | `text_encoders_0` and `text_encoders_1`     | the file's name without ending  |
| the webui's .pt   | `string_to_param.*` (n, D), and its `name`  | the file's name without ending  |
| the original .pt  | the same, and the tokens' numbers           | the file's name without ending  |
| a tensor alone    | none                                        | must be given                   |

(The webui finds embeddings by their files' names, not by the `name` inside.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from scumble.errors import Refused
from scumble_registry.compatibility import Shape
from scumble_registry.formats.lora.names import is_key
from scumble_registry.formats.pickled import RAW, Plain

FIRST, SECOND = "text_encoder", "text_encoder_2"
_ENCODERS = {
    "emb_params": FIRST,
    "clip_l": FIRST,
    "clip_g": SECOND,
    "text_encoders_0": FIRST,
    "text_encoders_1": SECOND,
}
_DIALECTS = {
    frozenset({"emb_params"}): "kohya or webui",
    frozenset({"clip_l"}): "SDXL pair, one half",
    frozenset({"clip_l", "clip_g"}): "SDXL pair",
    frozenset({"text_encoders_0", "text_encoders_1"}): "SDXL pair of diffusers' trainer",
}
_PARAM, _TOKEN = "string_to_param.", "string_to_token."
_PARAMETERS = frozenset({"weight", "bias"})  # ends of a layer's tensors, which no token has


@dataclass(frozen=True, slots=True)
class Embedding:
    """The layout of an embedding's file."""

    encoders: Mapping[str, str]
    """Tensor → its text encoder."""
    dialect: str
    token: str | None
    """The token in the file, or None."""
    leftover: Collection[str] = ()

    @property
    def must_be_named(self) -> bool:
        """Whether the publisher must name the token, because not even the file's name is one."""
        return self.dialect == _ALONE


_ALONE = "tensor alone"


def find(shapes: Mapping[str, Shape], plain: Plain) -> Embedding | None:
    """Return the layout, or None for another file; `plain` is a pickle's content without tensors. Raises Refused."""
    names = frozenset(shapes)
    for keys, dialect in _DIALECTS.items():
        if keys <= names and not (names - keys) & _ENCODERS.keys():
            return Embedding({name: _ENCODERS[name] for name in keys}, dialect, None, names - keys)
    if params := sorted(name for name in names if name.startswith(_PARAM)):
        return _of_pickle(params, names, plain)
    if len(names) != 1:
        return None
    ((name, shape),) = shapes.items()
    if len(shape) not in {1, 2} or name.rpartition(".")[2] in _PARAMETERS or is_key(name):
        return None
    if name == RAW and plain is not None:
        return Embedding({name: FIRST}, _ALONE, None)
    return Embedding({name: FIRST}, "diffusers", name)


def _of_pickle(params: list[str], names: frozenset[str], plain: Plain) -> Embedding:
    if len(params) > 1:
        words = ", ".join(name.removeprefix(_PARAM) for name in params)
        raise Refused(f"the file holds {len(params)} embeddings ({words}); publish each alone")
    numbers = {name for name in names if name.startswith(_TOKEN)}
    is_webui = isinstance(plain, dict) and "name" in plain
    return Embedding({params[0]: FIRST}, "webui" if is_webui else "original", None, names - {*params, *numbers})


def is_negative(metadata: Mapping[str, str]) -> bool:
    """Return whether the header marks it as an embedding for the negative prompt."""
    return metadata.get("modelspec.is_negative_embedding", "").strip().lower() in {"true", "1"}
