"""What every BlobStore keeps to. A new store is one more entry of STORES."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scumble.errors import NotFound
from scumble_registry.blob import Blob
from scumble_registry.store.blobs import BlobStore, FileStore, check

STORES: dict[str, Callable[[Path], BlobStore]] = {"file": FileStore}
NOTHING = Blob(digest="sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", size=0)


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return STORES[request.param](tmp_path / "store")


class Failing(io.BytesIO):
    """A source that breaks after its first piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise OSError(5, "the cable was pulled")
        return super().read(min(size or 3, 3))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(data=st.binary(max_size=5000))
def test_what_is_put_can_be_opened_and_its_name_is_its_sha256(store: BlobStore, data: bytes) -> None:
    blob = store.put(io.BytesIO(data))
    with store.open(blob) as source:
        assert source.read() == data
    assert blob.size == len(data)
    check(io.BytesIO(data), blob, "what was put")


def test_no_bytes_are_a_blob_too(store: BlobStore) -> None:
    assert store.put(io.BytesIO()) == NOTHING


def test_more_bytes_than_fit_one_read_arrive_whole(store: BlobStore) -> None:
    data = bytes(range(256)) * 10_000
    with store.open(store.put(io.BytesIO(data))) as source:
        assert source.read() == data


def test_the_same_bytes_twice_are_one_blob(store: BlobStore) -> None:
    assert store.put(io.BytesIO(b"ink")) == store.put(io.BytesIO(b"ink"))


def test_a_blob_that_is_not_there_is_not_found(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=NOTHING.digest):
        store.open(NOTHING)
    with pytest.raises(NotFound, match=NOTHING.digest):
        store.place(NOTHING, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_put_that_fails_leaves_nothing(store: BlobStore, tmp_path: Path) -> None:
    whole = Blob(digest="sha256:2e5d1ebba2ff2b3dae1c4e1d1b7ed2a4e2bb9c5b8f5ad1d7a6c0d0bb5c4ba1aa", size=6)
    with pytest.raises(Exception, match="cable"):
        store.put(Failing(b"broken"))
    with pytest.raises(NotFound):
        store.open(whole)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_placed_blob_is_a_read_only_file_with_the_bytes(store: BlobStore, tmp_path: Path) -> None:
    blob = store.put(io.BytesIO(b"ink"))
    store.place(blob, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"ink"
    assert (tmp_path / "target").stat().st_mode & 0o222 == 0


def test_removing_a_placed_file_leaves_the_blob(store: BlobStore, tmp_path: Path) -> None:
    blob = store.put(io.BytesIO(b"ink"))
    store.place(blob, tmp_path / "target")
    (tmp_path / "target").unlink()
    with store.open(blob) as source:
        assert source.read() == b"ink"


def test_many_writers_and_readers_of_one_blob_agree(store: BlobStore) -> None:
    data = b"x" * 100_000
    start = threading.Barrier(8)

    def write_and_read(_: int) -> bytes:
        start.wait()
        with store.open(store.put(io.BytesIO(data))) as source:
            return source.read()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(write_and_read, range(8))) == {data}


def test_what_is_stored_is_listed_until_it_is_removed(store: BlobStore) -> None:
    before = time.time() - 2
    one, two = store.put(io.BytesIO(b"one")), store.put(io.BytesIO(b"two"))
    listed = dict(store.stored())
    assert listed.keys() == {one, two}
    assert all(before < put < time.time() + 2 for put in listed.values())
    for _ in range(2):
        store.remove(one)
    assert [blob for blob, _ in store.stored()] == [two]
    with pytest.raises(NotFound):
        store.open(one)
