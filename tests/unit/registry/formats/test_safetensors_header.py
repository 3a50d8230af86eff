"""The bounded parser, against the library and against files made to hurt (FORMATS.md §8)."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scumble.errors import Refused
from scumble_registry.formats.safetensors_header import MAX_TENSORS, read_header, read_tensors, write

Entry = dict[str, Any]
ARRAYS = hnp.arrays(
    st.sampled_from([np.dtype("<f4"), np.dtype("<f2"), np.dtype("<i8"), np.dtype("u1")]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
TENSORS = st.dictionaries(st.text("abc._é", min_size=1, max_size=6), ARRAYS, max_size=5)
IN_ONE_FILE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def file_of(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> Entry:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@IN_ONE_FILE
@given(tensors=TENSORS)
def test_what_the_library_writes_is_read_bit_for_bit(tensors: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors, {"who": "the library"}))
    header = read_header(path)
    assert header.metadata == {"who": "the library"}
    found = read_tensors(path, header)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].tobytes() == array.tobytes()
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)


@IN_ONE_FILE
@given(tensors=TENSORS)
def test_the_library_reads_what_is_written_and_order_does_not_matter(tensors: dict[str, Any]) -> None:
    data = write(tensors, {"format": "x"})
    assert data == write(dict(reversed(tensors.items())), {"format": "x"})
    found = safetensors.numpy.load(data)
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }


@IN_ONE_FILE
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    with suppress(Refused):  # and nothing else
        read_header(path)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_reads_like_a_pickle_is_still_a_header(length: int, tmp_path: Path) -> None:
    assert read_header(file_of(tmp_path / "file", b"{}".ljust(length))).tensors == {}


def duplicate(path: Path) -> Path:
    one = json.dumps(entry())
    return file_of(path, f'{{"a":{one},"a":{one}}}'.encode(), b"0000")


ATTACKS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty file": (lambda p: p.touch() or p, "it is empty.*download it again"),
    "zeros": (lambda p: p.write_bytes(bytes(9000)) and p, "zeros only; download it again"),
    "git-lfs pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n") and p,
        "a git-lfs pointer.*git lfs pull",
    ),
    "web page": (lambda p: p.write_text("\n<!DOCTYPE html><html>login</html>" * 9) and p, "a web page.*login"),
    "error in JSON": (lambda p: p.write_text('{"error":"unauthorized"}') and p, "it is JSON.*download"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"weights" * 99)) and p, "gzip; unpack"),
    "picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)) and p, "it is a picture"),
    "cut off in its length": (lambda p: p.write_bytes(b"\x07\0\0") and p, "begins with the bytes 07 00 00, as none"),
    "cut off in its header": (
        lambda p: p.write_bytes(struct.pack("<Q", 900) + b'{"a":{"dtype"' + b" " * 99) and p,
        "cut off inside its header, at 120 bytes; download it again",
    ),
    "cut off in its data": (
        lambda p: file_of(p, {"a": entry(shape=(2,), offsets=(0, 8))}, b"0000"),
        "cut off: its tensors take 8 bytes, of which 4 are there",
    ),
    "text": (
        lambda p: p.write_text("Access to model x is restricted.\nYou must be authenticated to access it.") and p,
        "it is text, which begins with 'Access to model x is restricted.'; download",
    ),
    "text in another script": (lambda p: p.write_text("привет " * 20) and p, "it is text, which begins with 'привет"),
    "noise": (lambda p: p.write_bytes(bytes(range(200, 256)) * 3) and p, "begins with the bytes c8 c9 ca"),
    "8-bit floats": (lambda p: file_of(p, {"a": entry("F8_E4M3")}, b"0000"), "F8_E4M3, a float of less than 16"),
    "header of 2^62 bytes": (lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}") and p, "at most"),
    "header over 8 MB": (lambda p: file_of(p, b"{" + b" " * (9 << 20) + b"}"), "at most"),
    "no JSON": (lambda p: file_of(p, b"{nonsense"), "property name"),
    "no object": (lambda p: file_of(p, b"[1, 2, 3]"), "not a JSON object"),
    "deep JSON": (lambda p: file_of(p, b'{"a":' + b"[" * 100_000), "recursion"),
    "800 000 empty tensors": (
        lambda p: file_of(p, {str(i): entry("U8", [0], [0, 0]) for i in range(MAX_TENSORS + 1)}),
        "20001 tensors",
    ),
    "duplicate key": (duplicate, "is twice"),
    "half a million keys, the last twice": (
        lambda p: file_of(p, b"{" + b"".join(b'"%d":0,' % i for i in range(500_000)) + b'"x":0,"x":0}'),
        "'x' is twice",
    ),
    "nine dimensions": (lambda p: file_of(p, {"a": entry(shape=[1] * 9)}, b"0000"), "at most 8 dimensions"),
    "negative size": (lambda p: file_of(p, {"a": entry(shape=[-1])}, b"0000"), "no sound shape"),
    "boolean size": (lambda p: file_of(p, {"a": entry(shape=[True])}, b"0000"), "no sound shape"),
    "size that overflows": (lambda p: file_of(p, {"a": entry(shape=[2**40, 2**40])}, b"0000"), "bytes"),
    "shape against offsets": (lambda p: file_of(p, {"a": entry(shape=[2])}, b"0000"), "but 4 bytes"),
    "unknown dtype": (lambda p: file_of(p, {"a": entry("U4")}, b"0000"), "known are"),
    "dtype of another type": (lambda p: file_of(p, {"a": entry() | {"dtype": ["F32"]}}, b"0000"), "dtype"),
    "more keys": (lambda p: file_of(p, {"a": entry() | {"extra": 1}}, b"0000"), "must have"),
    "overlap": (lambda p: file_of(p, {"a": entry(), "b": entry()}, b"0000"), "not where the one before"),
    "hole": (lambda p: file_of(p, {"a": entry(offsets=(4, 8))}, b"0" * 8), "not where the one before"),
    "bytes after the end": (lambda p: file_of(p, {"a": entry()}, b"0" * 8), "has 8 after"),
    "beyond the end": (lambda p: file_of(p, {"a": entry()}, b""), "take 4 bytes, of which 0 are there"),
    "metadata that is no text": (lambda p: file_of(p, {"__metadata__": {"a": 1}}), "strings to strings"),
    "a pickle": (lambda p: p.write_bytes(b"\x80\x04\x95" + b"0" * 40) and p, "save it as safetensors"),
    "torch.save": (lambda p: p.write_bytes(b"PK\x03\x04" + b"0" * 40) and p, "save it as safetensors"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_made_to_hurt_is_refused(attack: str, tmp_path: Path) -> None:
    make, says = ATTACKS[attack]
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(Refused, match=says) as caught:
        read_header(path, "unet/bad.safetensors")
    assert caught.value.message.startswith("unet/bad.safetensors is not a sound safetensors file")
    assert caught.value.fields["file"] == "unet/bad.safetensors"
