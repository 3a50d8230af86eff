"""The lease on the cache: many share it, one is alone with it, and a file that is closed holds nothing."""

from __future__ import annotations

from pathlib import Path

from scumble_registry.store.leases import WorkLease


def test_nobody_is_alone_while_another_has_it_open(tmp_path: Path) -> None:
    one, other = WorkLease(tmp_path / "lock"), WorkLease(tmp_path / "lock")
    with one.alone() as alone:
        assert not alone
    other.close()
    with one.alone() as alone:
        assert alone
    one.close()


def test_after_being_alone_it_is_shared_again(tmp_path: Path) -> None:
    one = WorkLease(tmp_path / "lock")
    with one.alone():
        pass
    other = WorkLease(tmp_path / "lock")  # else this would wait for ever
    with other.alone() as alone:
        assert not alone, "the first still has it"
    one.close()
    other.close()
