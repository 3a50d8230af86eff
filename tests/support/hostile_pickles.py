"""Pickled files that torch.save writes, and files that are made to hurt: the corpus of tests and of `make fuzz`.

Nothing here is dangerous to look at; what would be run if a reader ran it writes the file `CANARY`.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CANARY = "scumble-was-executed"
RUN = f"touch {CANARY}"


def zipped(entries: list[tuple[str | zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def torch_zip(body: bytes, *more: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    """What torch.save would have written, had it pickled `body`."""
    return zipped([("a/data.pkl", body), ("a/byteorder", b"little"), *more, ("a/version", b"3\n")])


def saved(thing: Any, *, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


class Callback:
    """A class that a reader does not know, as Lightning's checkpoints are full of."""

    def __init__(self) -> None:
        self.monitor, self.best = "val/loss", Path("a/b")


def sound() -> dict[str, bytes]:
    """Files of people, small: what must be read, and equal what torch reads."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    vectors = torch.nn.ParameterDict({"*": torch.nn.Parameter(random(2, 8))})
    webui = {"string_to_token": {"*": 265}, "string_to_param": {"*": random(2, 8)}, "name": "ink", "step": 10}
    layers = OrderedDict([("linear.0.weight", random(8, 4)), ("linear.0.bias", random(8))])
    hypernetwork = {4: (layers, layers), "layer_structure": [1, 2, 1], "use_dropout": False, "name": "net"}
    shared = random(6, 6)
    checkpoint = {
        "state_dict": OrderedDict([("model.a", shared), ("model.b", shared[2:, ::2]), ("model.c", shared.t())]),
        "callbacks": {Callback: {"best": random(1)[0]}, "other": Callback()},
        "hyper_parameters": {"lr": 1e-4, "tags": {"x"}, "flat": (1, None, True)},
        "global_step": 3,
    }
    every = {
        str(kind): torch.ones(3, dtype=kind)
        for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    } | {str(kind): torch.ones(2, dtype=kind) for kind in (torch.int16, torch.int8, torch.uint8, torch.bool)}
    found: dict[str, bytes] = {}
    for name, thing in {
        "embedding of the webui": webui,
        "original embedding": {"string_to_token": {"*": 265}, "string_to_param": vectors},
        "embedding of diffusers": {"<ink>": random(8)},
        "tensor alone": random(3, 2).half(),
        "hypernetwork": hypernetwork,
        "checkpoint": checkpoint,
        "every dtype": every,
        "list": [random(2), torch.nn.Parameter(random(2)), torch.nn.Buffer(random(2)), torch.zeros(0, 3)],
    }.items():
        found[name] = saved(thing)
        found[f"{name}, old format"] = saved(thing, old=True)
    return found


def text(word: str) -> bytes:
    data = word.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def called(module: str, name: str, argument: bytes = text(RUN)) -> bytes:
    """GLOBAL, then REDUCE."""
    return f"\x80\x02c{module}\n{name}\n".encode("latin-1") + b"(" + argument + b"tR."


def storage(kind: str = "torch\nFloatStorage", key: str = "0", size: int = 4) -> bytes:
    return b"(" + text("storage") + f"c{kind}\n".encode() + text(key) + text("cpu") + number(size) + b"tQ"


def number(value: int) -> bytes:
    return b"\x8a" + bytes([len(raw := value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))]) + raw


def tensor(
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    offset: int = 0,
    where: bytes = b"",
    more: bytes = b"",
) -> bytes:
    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    ordered = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (where or storage())
        + number(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89"
        + ordered
        + more
        + b"tR"
    )


FOUR = ("a/data/0", bytes(16))


def of_tensor(**words: Any) -> bytes:
    return torch_zip(b"\x80\x02}" + text("t") + tensor(**words) + b"s.", FOUR)


class Evil:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def with_end(data: bytes, place: int, new: bytes) -> bytes:
    """Bytes of the zip's end record, counted from its start, replaced."""
    start = len(data) - 22 + place
    return data[:start] + new + data[start + len(new) :]


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def laughs(levels: int = 40) -> bytes:
    """[[…], […]] of the very same list, 2^levels leaves in a few hundred bytes."""
    body = b"\x80\x02]q\x00" + text("ha") + b"a"
    for level in range(levels):
        body += b"0]q" + bytes([level + 1]) + b"(h" + bytes([level]) + b"h" + bytes([level]) + b"e"
    return body + b"."


CALLS: dict[str, tuple[bytes, str]] = {
    "REDUCE of posix.system": (called("posix", "system"), "posix.system"),
    "REDUCE of os.system": (called("os", "system"), "os.system"),
    "REDUCE of nt.system": (called("nt", "system"), "nt.system"),
    "REDUCE of eval": (called("__builtin__", "eval"), "builtins.eval"),
    "REDUCE of exec": (called("builtins", "exec"), "builtins.exec"),
    "REDUCE of getattr": (called("builtins", "getattr"), "builtins.getattr"),
    "REDUCE of __import__": (called("builtins", "__import__"), "builtins.__import__"),
    "REDUCE of Popen": (called("subprocess", "Popen"), "subprocess.Popen"),
    "REDUCE of runpy": (called("runpy", "_run_code"), "runpy._run_code"),
    "REDUCE of torch.load": (called("torch", "load"), "torch.load"),
    "REDUCE of torch.hub": (called("torch.hub", "load"), "torch.hub.load"),
    "REDUCE of numpy.load": (called("numpy", "load"), "numpy.load"),
    "REDUCE of partial": (called("functools", "partial"), "functools.partial"),
    "REDUCE of attrgetter": (called("operator", "attrgetter"), "operator.attrgetter"),
    "REDUCE of pip": (called("pip", "main"), "pip.main"),
    "REDUCE of a marked function": (called("torch._utils", "_rebuild_sparse_tensor"), "_rebuild_sparse_tensor"),
    "REDUCE of bytes in bytes": (called("torch.storage", "_load_from_bytes"), "a file within a file"),
    "STACK_GLOBAL": (b"\x80\x04" + text("posix") + text("system") + b"\x93" + text(RUN) + b"\x85R.", "posix.system"),
    "STACK_GLOBAL through a module": (
        b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93" + text(RUN) + b"\x85R.",
        "torch.serialization.os.system",
    ),
    "STACK_GLOBAL of numbers": (b"\x80\x04K\x01K\x02\x93.", "whose name is no text"),
    "INST": (b"(S'" + RUN.encode() + b"'\niposix\nsystem\n.", "the opcode INST"),
    "OBJ": (b"\x80\x02(csubprocess\nPopen\n" + text(RUN) + b"o.", "subprocess.Popen"),
    "OBJ of a class": (b"\x80\x02(c__main__\nThing\n" + text(RUN) + b"o.", "the opcode OBJ"),
    "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n" + text(RUN) + b"\x85\x81.", "subprocess.Popen"),
    "NEWOBJ_EX": (b"\x80\x04csubprocess\nPopen\n" + text(RUN) + b"\x85}\x92.", "subprocess.Popen"),
    "BUILD": (b"\x80\x02c__main__\nThing\n)\x81}" + text("__setstate__") + b"cposix\nsystem\nsb.", "posix.system"),
    "EXT1": (b"\x80\x02\x82\x01.", "the opcode EXT1"),
    "EXT2": (b"\x80\x02\x83\x01\x00.", "the opcode EXT2"),
    "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "the opcode EXT4"),
    "PERSID": (b"\x80\x02Pposix.system\n.", "the opcode PERSID"),
    "BINPERSID of a call": (b"\x80\x02cposix\nsystem\nQ.", "posix.system"),
    "BINPERSID of words": (b"\x80\x02" + text("../../etc/passwd") + b"Q.", "no storage"),
    "NEXT_BUFFER": (b"\x80\x05\x97.", "the opcode NEXT_BUFFER"),
    "READONLY_BUFFER": (b"\x80\x05K\x01\x98.", "the opcode READONLY_BUFFER"),
    "call of what is no global": (b"\x80\x02" + text("x") + b")R.", "a call of a str"),
    "call through a rebuild": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(c__main__\nThing\nc__main__\nThing\n)}tR.",
        "a class that is not known",
    ),
    "real pickle of a call": (pickle.dumps(Evil(print, RUN), 2), "builtins.print"),
}
"""Every opcode that can call or import, in a bare pickle; `posix.system` and its like must be named."""


def hostile() -> dict[str, tuple[bytes, str]]:
    """Name → bytes and what the refusal says."""
    good = saved({"t": torch.arange(4.0)})
    old = saved({"t": torch.arange(4.0)}, old=True)
    short = torch_zip(b"\x80\x02N.")
    many = b"\x80\x02}(" + b"".join(text(str(i)) + tensor((0,), (1,)) for i in range(25_000)) + b"u."
    found: dict[str, tuple[bytes, str]] = dict(CALLS)
    found |= {f"{name}, zipped": (torch_zip(body), says) for name, (body, says) in CALLS.items()}
    found |= {
        "deflated bomb": (
            zipped([("a/data.pkl", b"\x80\x02N."), ("a/data/0", bytes(50 << 20))], zipfile.ZIP_DEFLATED),
            "compressed or encrypted",
        ),
        "zip in a zip": (torch_zip(b"\x80\x02N.", ("a/inner.zip", good)), "torch.save does not write"),
        "one name twice": (torch_zip(b"\x80\x02N.", ("a/version", b"9")), "two entries of one name"),
        "two data.pkl": (torch_zip(b"\x80\x02N.", ("b/data.pkl", b"\x80\x02N.")), "2 files named data.pkl"),
        "no data.pkl": (zipped([("word/document.xml", b"<a/>")]), "0 files named data.pkl"),
        "path upwards": (torch_zip(b"\x80\x02N.", ("a/../../x", b"")), "with the path"),
        "absolute path": (torch_zip(b"\x80\x02N.", ("/etc/x", b"")), "with the path"),
        "backslash": (torch_zip(b"\x80\x02N.", ("a\\data\\0", b"")), "with the path"),
        "symbolic link": (torch_zip(b"\x80\x02N.", (link("a/data/0"), b"/etc/passwd")), "a link or a folder"),
        "TorchScript": (torch_zip(b"\x80\x02N.", ("a/constants.pkl", b"\x80\x02).")), "TorchScript"),
        "cut off": (good[: len(good) // 2], "cut off"),
        "bytes behind a zip": (good + b"more", "cut off"),
        "directory elsewhere": (with_end(good, 16, struct.pack("<I", 40)), "two directories that differ"),
        "a million entries": (with_end(short, 8, struct.pack("<2H", 65_000, 65_000)), "65000 entries"),
        "disks": (with_end(short, 4, struct.pack("<H", 7)), "parts in other files"),
        "directory before its end": (with_end(short, 16, struct.pack("<I", 40)), "at its end"),
        "fewer entries": (with_end(short, 8, struct.pack("<2H", 1, 1)), "more than its entries"),
        "unknown byte order": (
            zipped([("a/data.pkl", b"\x80\x02N."), ("a/byteorder", b"middle")]),
            "unknown byte order",
        ),
        "expanded view": (of_tensor(shape=(10**6, 10**6), strides=(0, 0)), "of shape (1000000, 1000000)"),
        "view behind its storage": (of_tensor(offset=1), "in 16 bytes"),
        "strides behind its storage": (of_tensor(shape=(2, 2), strides=(3, 1)), "in 16 bytes"),
        "negative stride": (of_tensor(strides=(-1,)), "sound place, shape and strides"),
        "negative size": (of_tensor(shape=(-4,)), "sound place, shape and strides"),
        "size that overflows": (of_tensor(shape=(2**47, 2**47), strides=(1, 1)), "of shape"),
        "size beyond words": (of_tensor(shape=(2**70,)), "sound place, shape and strides"),
        "more strides than sizes": (of_tensor(strides=(1, 1)), "of 1 dimensions"),
        "ninety dimensions": (of_tensor(shape=(1,) * 90, strides=(1,) * 90), "of 90 dimensions"),
        "conjugate": (of_tensor(more=b"}" + text("conj") + b"\x88s"), "negation or conjugation"),
        "missing storage": (of_tensor(where=storage(key="9")), "whose numbers are missing"),
        "storage of another size": (of_tensor(where=storage(size=5)), "or of another count"),
        "storage of a huge size": (of_tensor(where=storage(size=2**62)), "or of another count"),
        "storage of a negative size": (of_tensor(where=storage(size=-4)), "or of another count"),
        "complex numbers": (of_tensor(where=storage("torch\nComplexFloatStorage")), "ComplexFloatStorage"),
        "quantised numbers": (of_tensor(where=storage("torch\nQInt8Storage")), "QInt8Storage"),
        "storage of a stranger": (of_tensor(where=storage("evil\nFloatStorage")), "evil.FloatStorage"),
        "one storage with two types": (
            torch_zip(b"\x80\x02]" + tensor() + b"a" + tensor(where=storage("torch\nIntStorage")) + b"a.", FOUR),
            "two types or sizes",
        ),
        "25 000 empty tensors": (torch_zip(many, ("a/data/0", bytes(16))), "more than 20000 tensors"),
        "one tensor many times": (
            torch_zip(
                b"\x80\x02]q\x00"
                + tensor((2**19,), (1,), where=storage(size=2**19))
                + b"q\x01a("
                + b"h\x01" * 1000
                + b"e.",
                ("a/data/0", bytes(2**21)),
            ),
            "tensors that share numbers",
        ),
        "two tensors of one name": (
            torch_zip(b"\x80\x02}(" + text("1") + tensor() + number(1) + tensor() + b"u.", FOUR),
            "two tensors of one name",
        ),
        "the header's own name": (
            torch_zip(b"\x80\x02}" + text("__metadata__") + tensor() + b"s.", FOUR),
            "'__metadata__'",
        ),
        "a name without end": (torch_zip(b"\x80\x02}" + text("n" * 5000) + tensor() + b"s.", FOUR), "5000 characters"),
        "deep lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "lists in lists"),
        "list in itself": (b"\x80\x02]q\x00h\x00a.", "lists in lists"),
        "memo bomb": (laughs(), "more than"),
        "long text, often": (
            b"\x80\x02]" + text("x" * 10**6) + b"q\x00" + b"ah\x00" * 100 + b"a.",
            "characters of text",
        ),
        "huge LONG4": (b"\x80\x02\x8b" + struct.pack("<i", 4_000_000) + b"\x7f" * 4_000_000 + b".", "whole number of"),
        "LONG4 that lies": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".", "no pickle"),
        "negative LONG4": (b"\x80\x02\x8b" + struct.pack("<i", -1) + b".", "no pickle"),
        "LONG of a million digits": (b"\x80\x02L" + b"9" * 10**6 + b"L\n.", "no pickle"),
        "BINUNICODE8 that lies": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.", "no pickle"),
        "two million opcodes": (b"\x80\x02]" + b"Na" * 10**6 + b".", "opcodes"),
        "memo without end": (
            b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", i << 12) for i in range(9)) + b".",
            "no tensors",
        ),
        "unknown opcode": (b"\x80\x02\xff.", "no pickle"),
        "no STOP": (b"\x80\x02]", "no pickle"),
        "empty stack": (b"\x80\x02.", "more than there is"),
        "no mark": (b"\x80\x02t.", "no mark|where none is"),
        "memo that is not there": (b"\x80\x02h\x07.", "where nothing is"),
        "half a character": (b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.", "half a character"),
        "list as a key": (b"\x80\x02}]Ns.", "a key that cannot be one"),
        "keys of one hash": (
            b"\x80\x02}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, 20_000)) + b"u.",
            "a key that cannot be one",
        ),
        "tuples of one hash": (
            b"\x80\x02}(" + b"".join(number(i * (2**61 - 1)) + b"\x85N" for i in range(1, 20_000)) + b"u.",
            "a key that cannot be one",
        ),
        "memo places of one hash": (
            b"\x80\x02N" + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(1, 20_000)) + b".",
            "a memo of 61 bits",
        ),
        "tuple as a key": (b"\x80\x02})Ns.", "neither text nor a whole number"),
        "append to a number": (b"\x80\x02K\x01Na.", "appended to a int"),
        "nothing but plain values": (pickle.dumps({"a": [1, 2.5, None]}, 2), "no tensors"),
        "bytes behind a pickle": (pickle.dumps({"a": 1}, 2) + b"more", "bytes after its end"),
        "old format, cut off": (old[:-3], "too few bytes"),
        "old format, more": (old + b"more", "bytes after its last tensor"),
        "old format, another count": (old[:-24] + struct.pack("<Q", 2**60) + old[-16:], "a storage of"),
        "a whole module": (saved(torch.nn.Linear(2, 2)), "no tensors"),
        "sparse tensor": (saved({"t": torch.eye(3).to_sparse()}), "_rebuild_sparse_tensor"),
        "eight-bit floats": (saved({"t": torch.ones(2).to(torch.float8_e4m3fn)}), "float8_e4m3fn"),
    }
    return found
