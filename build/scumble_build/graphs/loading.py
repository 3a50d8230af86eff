"""Load a component of a whole model strictly: what is missing is never made up, what is unknown never ignored.

diffusers and transformers fill missing tensors at random, or leave them without values, and only warn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError

from scumble.errors import Refused
from scumble_registry.formats.structure import Mismatch, is_unused
from scumble_registry.formats.whole import check_headers

Model = TypeVar("Model", bound=torch.nn.Module)


def load_whole(kind: type[Model], folder: Path, dtype: torch.dtype) -> Model:
    """Load a model of diffusers or transformers from a folder, with every tensor from its files.

    Raises Refused, naming tensors that are missing, unknown or of another shape, and where a file cannot be read.
    """
    check_headers(folder)
    loader: Any = kind
    is_diffusers = issubclass(kind, ModelMixin)
    # transformers tells of shapes instead of raising; diffusers' own error names the tensor.
    how = {"torch_dtype": dtype} if is_diffusers else {"dtype": dtype, "ignore_mismatched_sizes": True}
    try:
        model, told = loader.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, use_safetensors=True, **how
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).partition(". If you want")[0]
        raise Refused(f"{folder.name} cannot be loaded: {reason}") from error
    difference = Mismatch(
        missing=tuple(sorted(told["missing_keys"])),
        unknown=tuple(sorted(name for name in told["unexpected_keys"] if not is_unused(kind.__name__, name))),
        misshapen={name: (tuple(actual), tuple(expected)) for name, actual, expected in told["mismatched_keys"]},
    )
    difference.refuse(folder.name)
    loaded: Model = model
    return loaded


@contextmanager
def loading(ref: str, digest: str, part: str = "") -> Iterator[None]:
    """Raise a Refused that names the version, and `part` of it, in place of one that names only tensors."""
    try:
        yield
    except Refused as error:
        of = f"{part} of " if part else ""
        raise type(error)(
            f"{of}{ref} ({digest}) cannot be loaded: {error.message}",
            **{**error.fields, "ref": ref, "digest": digest},
        ) from error
