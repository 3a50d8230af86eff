"""The files that are published (`Source`), and what a format derives from them (`Draft`)."""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pydantic import JsonValue

from scumble.errors import NotFound, Refused
from scumble.files import reading
from scumble_registry.compatibility import Compatibility, PredictionType
from scumble_registry.formats.pickled.tree import Plain
from scumble_registry.formats.safetensors_header import Unwritten, what_it_is
from scumble_registry.manifest import Defaults, Sampling

_MAX_FILES = 2000
_MAX_JSON = 64 << 20  # tokenizers
_TEXT = frozenset({".json", ".txt", ".md", ".yaml"})
_PICTURES = {".png": b"\x89PNG", ".jpg": b"\xff\xd8\xff", ".jpeg": b"\xff\xd8\xff", ".webp": b"RIFF"}
_PLAIN_NAMES = frozenset({"LICENSE", "NOTICE", "README", "AUTHORS", "COPYING"})
WEIGHTS = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".onnx", ".h5", ".msgpack", ".gguf", ".npz"})
"""Endings of weights that are not safetensors by name."""
Stamp = tuple[int, int, int]
"""Inode, size and time of change: differs when a file was written to."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What a publisher states where the files do not."""

    like: Callable[[], Path] | None = None
    """Returns a folder in the diffusers layout, from which a single file takes configs, tokenizers and missing
    components."""
    prediction_type: PredictionType | None = None
    ema: bool = False
    """Whether to read the averaged weights (EMA) of a checkpoint that has both."""
    shortcut: bool | None = None
    """Whether an IP-Adapter FaceID-Plus is a PlusV2."""


@dataclass(frozen=True, slots=True)
class Source:
    path: Path
    files: dict[str, Path]
    """Relative path with '/' → file, sorted; regular files only."""
    words: tuple[str, ...] = ()
    """The trigger words that the publisher gave."""
    base_folder: Callable[[], Path] | None = None
    """Returns the materialised folder of the base that it is published for; None without a base."""
    work: Path | None = None
    """A temporary folder for converted files."""
    allow_leftover: bool = False
    """Whether unknown keys may be left out; the manifest then names them."""
    max_bytes: int | None = None
    """The most bytes that the weights may have; None: the limit of their kind."""
    hints: Hints = field(default_factory=Hints)
    plain: Mapping[str, Plain] = field(default_factory=dict)
    """File that was a pickle (see `incoming.py`) → its content, with a Leaf in place of each tensor."""

    @classmethod
    def scan(cls, path: Path, words: tuple[str, ...] = ()) -> Source:
        """List the files under `path`. Raises NotFound; Refused for links, special files and unsafe names."""
        if not os.path.lexists(path):
            raise NotFound(f"there is no file or folder {path}; check the path")
        path = path.resolve()  # the path itself may be a link that the publisher chose
        if path.is_dir():
            files = {file.relative_to(path).as_posix(): file for file in _walk(path)}
        else:
            files = {path.name: path}
        for name, file in files.items():
            if not stat.S_ISREG(file.lstat().st_mode):
                raise Refused(
                    f"{name} is a link or a special file; publish regular files (`cp -rL` makes them from links)"
                )
            if not name.isprintable():
                raise Refused(f"the file name {name!r} has characters that cannot be shown; rename it")
        if len({name.casefold() for name in files}) < len(files):
            raise Refused("two file names differ in upper and lower case only; some file systems cannot hold both")
        return cls(path, dict(sorted(files.items())), words)

    def stamps(self) -> dict[str, Stamp]:
        """Return each file's stamp, to be compared before and after reading, as a file that changes is refused."""
        by_name = {name: file.stat() for name, file in self.files.items()}
        return {name: (stats.st_ino, stats.st_size, stats.st_mtime_ns) for name, stats in by_name.items()}

    def json(self, name: str) -> Any:
        """Parse a JSON file. Raises Refused, naming the file, when it is missing, too large or not JSON."""
        file = self.files.get(name)
        if file is None:
            raise Refused(f"{self.path} lacks {name}; publish the whole folder")
        if file.stat().st_size > _MAX_JSON:
            raise Refused(f"{name} is larger than {_MAX_JSON} bytes, too large for JSON of this kind")
        try:
            return json.loads(file.read_text(encoding="utf-8-sig"))  # some editors write a mark first
        except (ValueError, RecursionError) as error:
            raise Refused(f"{name} is not JSON: {error}") from error

    def weights(self) -> dict[str, Path]:
        return {name: file for name, file in self.files.items() if name.endswith(".safetensors")}

    def limit(self, default: int) -> int:
        """Return the publisher's `max_bytes`, or the kind's `default` limit in bytes."""
        return default if self.max_bytes is None else self.max_bytes


@dataclass(frozen=True, slots=True)
class Draft:
    """What a format derives from a source; publishing adds the rest of the manifest."""

    files: dict[str, Path]
    compatibility: Compatibility
    record: bytes | Unwritten | None = None
    defaults: Defaults | None = None
    sampling: Sampling | None = None
    """The sampling that the files state; the publisher's replaces it."""
    trigger_words: tuple[str, ...] = ()
    dialect: str = ""
    """The tool whose layout the files have, in a word or two (`kohya`, `PEFT folder`), for people."""
    details: Mapping[str, JsonValue] = field(default_factory=dict)
    """What `inspect` shows beyond the compatibility: ranks, alphas and serving class by module, training metadata."""
    leftover: tuple[str, ...] = ()
    """Keys that were left out, which `Source.allow_leftover` permits, sorted."""

    def open_record(self) -> BinaryIO | None:
        """Open the record's bytes, which may be generated while they are read."""
        if self.record is None:
            return None
        return io.BytesIO(self.record) if isinstance(self.record, bytes) else reading(self.record.chunks())


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A base or checkpoint as a folder in the diffusers layout, with details on its original files."""

    source: Source
    details: Mapping[str, JsonValue] = field(default_factory=dict)
    leftover: tuple[str, ...] = ()
    dialect: str = "diffusers folder"


def check_plain(source: Source) -> None:
    """Raises Refused for any file that is not safetensors, text or an image."""
    for name, file in source.files.items():
        ending = PurePosixPath(name).suffix.lower()
        if ending in WEIGHTS:
            what = what_it_is(_start(file)) or (
                "save the model with safe_serialization=True (diffusers' default) and remove other files"
            )
            raise Refused(
                f"{name} is neither safetensors nor a pickle by torch.save, so its weights cannot be read: {what}",
                file=name,
            )
        if ending == ".json":
            source.json(name)
        elif not _is_plain(name, file):
            raise Refused(f"{name} is neither safetensors, text nor an image; remove it and publish again", file=name)


def _is_plain(name: str, file: Path) -> bool:
    path = PurePosixPath(name)
    if path.suffix == ".safetensors":
        return True  # its header was parsed when it came in (`incoming.py`)
    start = _start(file)
    if path.suffix in _PICTURES:
        return start.startswith(_PICTURES[path.suffix])
    if path.suffix == ".model":  # sentencepiece
        return True
    return (path.suffix in _TEXT or path.name in _PLAIN_NAMES) and b"\0" not in start


def _start(file: Path) -> bytes:
    with file.open("rb") as source:
        return source.read(4096)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files but hidden ones (`.git`, `.cache`, `.DS_Store`)."""
    count = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (Path(parent) / name).is_symlink():
                raise Refused(f"{Path(parent) / name} is a link; publish regular files and folders only")
        for name in names:
            if not name.startswith("."):
                count += 1
                if count > _MAX_FILES:
                    raise Refused(f"{folder} has more than {_MAX_FILES} files; is it the right folder?")
                yield Path(parent) / name
