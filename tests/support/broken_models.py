"""Models that are not whole, or whole in an old spelling; published as they could be before they were compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

from scumble_registry.formats import structure

Tensors = dict[str, torch.Tensor]


@contextmanager
def unchecked() -> Iterator[None]:
    """Publish whatever comes."""
    with patch.object(structure, "compare_shapes", lambda *_: structure.Mismatch()):
        yield


def edit_tensors(file: Path, change: Callable[[Tensors], object]) -> Path:
    """Write a file of weights again after `change` altered the tensors by name."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return file


def without(folder: Path, copy: Path, file: str, tensor: str) -> Path:
    """Copy a folder; one of its files lacks the tensor whose name ends so."""
    shutil.copytree(folder, copy)
    edit_tensors(copy / file, lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(tensor))))
    return copy


def old_text(tensors: Tensors) -> None:
    """Spell a text encoder as transformers < 4.31 did, as part of a whole CLIP."""
    for name in list(tensors):
        tensors["text_model." + name.removeprefix("text_model.")] = tensors.pop(name)
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["text_projection.weight"] = torch.zeros(32, 32)


def old_vae(tensors: Tensors) -> None:
    """Spell a VAE's attention as diffusers < 0.15 did."""
    spellings = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in [name for name in tensors if ".attentions." in name]:
        new, old = next(((new, old) for new, old in spellings.items() if f".{new}." in name), ("", ""))
        tensors[name.replace(new, old) if new else name] = tensors.pop(name)
