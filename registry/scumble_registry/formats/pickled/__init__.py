"""Convert pickled weights (`.pt`, `.bin`, `.ckpt`, `.pth`) to safetensors without executing any of their code.

A pickle is a program for a stack machine whose opcodes may import and call whatever they name. Here a machine
(`machine.py`) interprets only the opcodes that build data; it imports nothing and calls nothing. The functions of a
state dict (`meaning.py`) are read as data, unknown classes become inert placeholders, and all other functions are
refused by name.

    process.py    the parent: starts the reader, waits, and reads its JSON document and safetensors file
    child.py      the reader: a process without rights, under limits of memory, time and files
    archive.py    torch.save's zip: stored entries only, none of which overlap
    legacy.py     torch.save's format before 1.6, and bare pickles
    machine.py    opcodes → a tree of plain values, views of storages and placeholders
    meaning.py    the allow-list of globals in weights files, and how each is read
    tree.py       the tree as JSON for the parent: tensors by name, plain values as they are
    tensors.py    views, checked against their storages and written one after another

torch's safe mode (`weights_only=True`) is no substitute: it inflates zip bombs, expands views of a kilobyte to
terabytes, and refuses files that are in use (ParameterDict embeddings, Lightning checkpoints).
"""

from scumble_registry.formats.pickled.process import to_safetensors
from scumble_registry.formats.pickled.tree import RAW, Leaf, Placeholder, Plain

__all__ = ["RAW", "Leaf", "Placeholder", "Plain", "to_safetensors"]
