"""Convert pickles to safetensors before a format is chosen, so that formats see only safetensors weights, all sound.

Content decides what a file is, not its name. A pickle (torch.save's, say) is converted into `source.work`; the
safetensors file takes its place in the source and in the store, under the same name with the ending `.safetensors`.
A tensor's name is its path through the pickle, joined with '.' (`state_dict.model.weight`, `320.0.linear.0.weight`; a
pickled tensor alone is `tensor`). `source.plain` has, by the new file name, the pickle's values that are not tensors.
The byte order mark that some editors write before JSON is taken off: diffusers does not read such files.
"""

from __future__ import annotations

import shutil
import struct
from codecs import BOM_UTF8
from dataclasses import replace
from pathlib import Path, PurePosixPath

from scumble.errors import Refused
from scumble_registry.formats.pickled import Plain, to_safetensors
from scumble_registry.formats.safetensors_header import MAX_HEADER, read_header
from scumble_registry.formats.source import WEIGHTS, Source

SUFFIX = ".safetensors"
_LARGEST = 20 << 30
"""The largest limit of all kinds, a checkpoint's: the kind is not known before the file is read."""
_PICKLES = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))


def with_safetensors(source: Source) -> Source:
    """Return `source` with every pickle converted and every header of weights read. Raises Refused, naming file and
    reason.
    """
    _check_size(source)
    files: dict[str, Path] = {}
    plain: dict[str, Plain] = {}
    for name, file in source.files.items():
        kind = kind_of(file)
        new = safetensors_name(name) if kind else name
        if new != name and (new in source.files or new in files):
            raise Refused(f"{name} would become {new}, which exists too; publish one of the two", file=name)
        files[new] = file
        if kind == "pickle":
            if source.work is None:
                raise ValueError("a pickle needs Source.work to be converted in")
            files[new] = source.work / "converted" / new
            files[new].parent.mkdir(parents=True, exist_ok=True)
            plain[new] = to_safetensors(file, files[new], source.limit(_LARGEST))
        elif new.endswith(SUFFIX):
            read_header(file, name)
        elif new.endswith(".json") and source.work is not None:
            files[new] = _without_mark(file, source.work / "converted" / new)
    return replace(source, files=dict(sorted(files.items())), plain=plain)


def _without_mark(file: Path, target: Path) -> Path:
    """Return `file`, or a copy without its byte order mark as `target`."""
    with file.open("rb") as content:
        if content.read(len(BOM_UTF8)) != BOM_UTF8:
            return file
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as copy:
            shutil.copyfileobj(content, copy)
    return target


def _check_size(source: Source) -> None:
    size, limit = sum(file.stat().st_size for file in source.files.values()), source.limit(_LARGEST)
    if size > limit:
        raise Refused(f"{source.path} has {size:,} bytes, more than {limit:,}; --max-size raises the limit", bytes=size)


def safetensors_name(name: str) -> str:
    """Return the name with the ending `.safetensors` in place of another ending of weights.

    >>> safetensors_name("sub/easy.negative.pt"), safetensors_name("style-v1.5")
    ('sub/easy.negative.safetensors', 'style-v1.5.safetensors')
    """
    path = PurePosixPath(name)
    has_ending = path.suffix.lower() in WEIGHTS | {SUFFIX}
    return str(path.with_suffix(SUFFIX) if has_ending else path.with_name(path.name + SUFFIX))


def kind_of(file: Path) -> str:
    """Return `safetensors`, `pickle` (also for a zip around one), or an empty string for another file."""
    with file.open("rb") as opened:
        start = opened.read(9)
    if len(start) == 9 and struct.unpack("<Q", start[:8])[0] <= MAX_HEADER and start[8:] == b"{":
        return "safetensors"
    return "pickle" if start.startswith(_PICKLES) else ""
