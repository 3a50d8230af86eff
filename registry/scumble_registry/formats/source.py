"""The files that somebody publishes, and what a format makes of them."""

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
from scumble_registry.formats.safetensors_header import Unwritten
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
    """What a publisher says of files that do not say it themselves."""

    like: Callable[[], Path] | None = None
    """Where a folder in the diffusers layout is from which a single file takes configs, tokenizers, and what it
    lacks."""
    prediction_type: PredictionType | None = None
    ema: bool = False
    """Of a checkpoint that holds averaged weights too, these are meant."""
    shortcut: bool | None = None
    """An IP-Adapter FaceID-Plus is (not) of the second version."""


@dataclass(frozen=True, slots=True)
class Source:
    path: Path
    files: dict[str, Path]
    """Relative path with '/' → file, sorted; regular files only."""
    words: tuple[str, ...] = ()
    """The trigger words that the publisher gave: some files do not hold their own."""
    base_folder: Callable[[], Path] | None = None
    """Where the files of the base are that it is published for, filled when asked for; None without a base."""
    work: Path | None = None
    """A folder for what is made of the files; gone when the version is published."""
    allow_leftover: bool = False
    """The publisher lets keys that nobody understands be left out; the manifest then names them."""
    max_bytes: int | None = None
    """How large the weights may be; None: what is sound for their kind."""
    hints: Hints = field(default_factory=Hints)
    plain: Mapping[str, Plain] = field(default_factory=dict)
    """Of each file here that was a pickle (see `incoming.py`): what it held, with a Leaf where each tensor was."""

    @classmethod
    def scan(cls, path: Path, words: tuple[str, ...] = ()) -> Source:
        """Raises NotFound for nothing there; Refused for links, special files and hidden surprises."""
        if not os.path.lexists(path):
            raise NotFound(f"there is no file or folder {path}")
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
        """To be compared before and after: a file that changes while it is published is refused."""
        by_name = {name: file.stat() for name, file in self.files.items()}
        return {name: (stats.st_ino, stats.st_size, stats.st_mtime_ns) for name, stats in by_name.items()}

    def json(self, name: str) -> Any:
        """Raises Refused, naming the file, when it is missing, too large or no JSON."""
        file = self.files.get(name)
        if file is None:
            raise Refused(f"{self.path} lacks {name}; publish the whole folder")
        if file.stat().st_size > _MAX_JSON:
            raise Refused(f"{name} is larger than {_MAX_JSON} bytes, too large for JSON of this kind")
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise Refused(f"{name} is not JSON: {error}") from error

    def weights(self) -> dict[str, Path]:
        return {name: file for name, file in self.files.items() if name.endswith(".safetensors")}

    def limit(self, sound: int) -> int:
        """The publisher's `max_bytes`, or what is `sound` where nothing was said."""
        return sound if self.max_bytes is None else self.max_bytes


@dataclass(frozen=True, slots=True)
class Draft:
    """What a format derives from a source; publishing adds the rest of the manifest."""

    files: dict[str, Path]
    compatibility: Compatibility
    record: bytes | Unwritten | None = None
    defaults: Defaults | None = None
    sampling: Sampling | None = None
    """How the files say that they were made to be sampled; the publisher's word goes before it."""
    trigger_words: tuple[str, ...] = ()
    dialect: str = ""
    """Whose layout it is, in a word or two (`kohya`, `PEFT folder`): for people."""
    details: Mapping[str, JsonValue] = field(default_factory=dict)
    """What `inspect` says beyond the compatibility: ranks, alphas and serving class by module, training metadata."""
    leftover: tuple[str, ...] = ()
    """Keys that were left out because `Source.allow_leftover` said so, sorted."""

    def open_record(self) -> BinaryIO | None:
        """The record's bytes, which may be made only while they are read."""
        if self.record is None:
            return None
        return io.BytesIO(self.record) if isinstance(self.record, bytes) else reading(self.record.chunks())


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A base or checkpoint as a folder in the diffusers layout, and what is told of the files that it was."""

    source: Source
    details: Mapping[str, JsonValue] = field(default_factory=dict)
    leftover: tuple[str, ...] = ()
    dialect: str = "diffusers folder"


def check_plain(source: Source) -> None:
    """Refuse everything beside safetensors that is not plainly a text or a picture."""
    for name, file in source.files.items():
        ending = PurePosixPath(name).suffix.lower()
        if ending in WEIGHTS:
            raise Refused(
                f"{name} is neither safetensors nor a pickle that torch.save wrote: no weights that can enter the "
                "registry. Save the model with safe_serialization=True (diffusers' default) and remove other files",
                file=name,
            )
        if ending == ".json":
            source.json(name)
        elif not _is_plain(name, file):
            raise Refused(f"{name} is neither safetensors, text nor a picture; remove it and publish again", file=name)


def _is_plain(name: str, file: Path) -> bool:
    path = PurePosixPath(name)
    if path.suffix == ".safetensors":
        return True  # its header is parsed where it is read
    with file.open("rb") as source:
        start = source.read(4096)
    if path.suffix in _PICTURES:
        return start.startswith(_PICTURES[path.suffix])
    if path.suffix == ".model":  # sentencepiece
        return True
    return (path.suffix in _TEXT or path.name in _PLAIN_NAMES) and b"\0" not in start


def _walk(folder: Path) -> Iterator[Path]:
    """All files; hidden ones (`.git`, `.cache`, `.DS_Store`) belong to tools and are left out."""
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
