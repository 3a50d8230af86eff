"""Export a record in layouts that other tools read.

diffusers       `learned_embeds.safetensors`, one tensor named by its token; SDXL's pair as below
kohya, webui    a file named by its token, with `emb_params`; SDXL's pair: `clip_l` and `clip_g`

A token with characters that a file's name cannot have needs `--trigger` when such a file is published again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from scumble_registry.compatibility import TextualInversionCompatibility
from scumble_registry.formats.safetensors_header import write
from scumble_registry.formats.stored import StoredVersion, header_metadata
from scumble_registry.formats.textual_inversion.record import TextualInversionRecord, read_record

LAYOUTS = ("diffusers", "kohya", "webui")
_PAIR = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def export_version(version: StoredVersion, layout: str, target: Path) -> None:
    adapter = version.manifest.compatibility
    assert isinstance(adapter, TextualInversionCompatibility)
    export(read_record(version.record()), adapter.token, layout, target, header_metadata(version))


def export(
    record: TextualInversionRecord, token: str, layout: str, folder: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file into the existing `folder`; `metadata` goes into its header."""
    header = dict(metadata or {})
    if len(record) > 1:
        tensors = {_PAIR[encoder]: vectors for encoder, vectors in record.items()}
        (folder / file_name(token)).write_bytes(write(tensors, header))
        return
    (vectors,) = record.values()
    if layout == "diffusers":
        (folder / "learned_embeds.safetensors").write_bytes(write({token: vectors}, header))
    else:
        (folder / file_name(token)).write_bytes(write({"emb_params": vectors}, header))


def file_name(token: str) -> str:
    """Return the token as a file name, without characters that file systems or shells treat specially.

    >>> file_name("<my cat>"), file_name("…")
    ('my cat.safetensors', 'embedding.safetensors')
    """
    return (re.sub(r"[^A-Za-z0-9_. -]+", "", token).strip(". ")[:100] or "embedding") + ".safetensors"
