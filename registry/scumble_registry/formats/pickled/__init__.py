"""Pickled weights (`.pt`, `.bin`, `.ckpt`, `.pth`) become safetensors here, and nothing of them is ever executed.

A pickle is a program for a stack machine whose opcodes may import and call whatever they name. Here it is walked by
a machine of our own (`machine.py`) that knows the opcodes that build data, imports nothing and calls nothing: what a
state dict needs (`meaning.py`) is read as data, classes that nobody knows are inert placeholders, and functions that
have no place in a weights file are refused by name.

    process.py    the parent: starts the reader, waits, takes from it a JSON document and a safetensors file
    child.py      the reader: a process without rights, under limits of memory, time and files
    archive.py    torch.save's zip: stored entries only, each in a place of its own
    legacy.py     torch.save's format before 1.6, and bare pickles
    machine.py    opcodes → a tree of plain values, views of storages and placeholders
    meaning.py    what the globals of a weights file mean; all others are refused
    tree.py       the tree on its way to the parent: tensors by name, the rest as it is
    tensors.py    views, checked against their storages, written one after another

Loading in torch's safe mode (`weights_only=True`) is no substitute: it inflates zip bombs, takes views of a kilobyte
for terabytes, and refuses files that people have (ParameterDict embeddings, Lightning checkpoints).
"""

from scumble_registry.formats.pickled.process import to_safetensors
from scumble_registry.formats.pickled.tree import RAW, Leaf, Placeholder, Plain

__all__ = ["RAW", "Leaf", "Placeholder", "Plain", "to_safetensors"]
