"""Budgets, leases, single flight: what is resident, and who waits for whom."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble.errors import Cancelled, QueueFull, Refused, ScumbleError, Unavailable
from scumble_server.memory.prefetch import CAPACITY, Prefetcher
from scumble_server.memory.residency import Lease, Residency


def put(lease: Lease, key: str, nbytes: int = 10) -> str:
    return lease.get(key, nbytes, lambda: key)


def held_by_nobody(residency: Residency, *keys: str, nbytes: int = 10) -> None:
    for key in keys:
        with residency.open() as lease:
            put(lease, key, nbytes)


def is_there(residency: Residency, key: str) -> bool:
    return key in residency._entries


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_least_recently_used_goes_first() -> None:
    residency = Residency(30, "test")
    held_by_nobody(residency, "a", "b", "c", "a", "d")
    assert [is_there(residency, key) for key in "abcd"] == [True, False, True, True]
    assert residency.stats().evictions == 1
    assert residency.stats().bytes == 30


def test_what_a_lease_holds_stays() -> None:
    residency = Residency(30, "test")
    lease = residency.open()
    put(lease, "a")
    held_by_nobody(residency, "b", "c", "d", "e")
    assert is_there(residency, "a")
    lease.release()
    held_by_nobody(residency, "f", "g", "h")
    assert not is_there(residency, "a")


def test_two_leases_hold_the_same_entry() -> None:
    residency = Residency(20, "test")
    one, two = residency.open(), residency.open()
    put(one, "a")
    put(two, "a")
    one.release()
    one.release()
    held_by_nobody(residency, "b", "c")
    assert is_there(residency, "a")


def test_a_value_that_does_not_fit_waits_until_another_lease_ends() -> None:
    residency = Residency(20, "test")
    running, waiting = residency.open(), residency.open()
    put(running, "a", 15)
    future = in_thread(lambda: put(waiting, "b", 15))
    until(lambda: residency.stats().waits == 1)
    assert not future.done()
    running.release()
    assert future.result(10) == "b"
    assert not is_there(residency, "a")


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    residency = Residency(20, "device")
    with residency.open() as lease:
        put(lease, "a", 15)
        with pytest.raises(Refused, match="25 bytes of device memory, the budget is 20") as caught:
            put(lease, "b", 10)
    assert caught.value.fields == {"needed": 25, "budget": 20}


def test_who_is_not_wanted_any_more_does_not_wait_on() -> None:
    residency = Residency(20, "test")
    cancelled = threading.Event()

    def check() -> None:
        if cancelled.is_set():
            raise Cancelled("gone")

    put(residency.open(), "a", 15)
    future = in_thread(lambda: put(residency.open(check), "b", 15))
    until(lambda: residency.stats().waits == 1)
    cancelled.set()
    assert isinstance(future.exception(10), Cancelled)


def test_closing_ends_every_wait() -> None:
    residency = Residency(20, "test")
    put(residency.open(), "a", 15)
    future = in_thread(lambda: put(residency.open(), "b", 15))
    until(lambda: residency.stats().waits == 1)
    residency.close()
    assert isinstance(future.exception(10), Unavailable)


def test_clearing_drops_every_value_once_and_what_shares_memory_with_another_before_it() -> None:
    residency, dropped = Residency(100, "test"), list[str]()
    lease = residency.open()
    lease.get("base", 10, lambda: "base", drop=dropped.append)
    lease.get("variant", 10, lambda: "variant", of="base", drop=dropped.append)
    lease.get("picture", 10, lambda: "picture")
    residency.close()
    residency.clear()
    residency.clear()
    assert dropped == ["variant", "base"]
    assert residency.stats().bytes == 0


def test_those_who_wait_for_each_other_are_told_to_try_again() -> None:
    residency = Residency(20, "test")
    one, two = residency.open(), residency.open()
    put(one, "a")
    put(two, "b")
    first = in_thread(lambda: put(one, "c"))
    until(lambda: residency.stats().waits == 1)
    with pytest.raises(QueueFull):
        put(two, "d")
    two.release()
    assert first.result(10) == "c"


def test_a_value_may_be_made_of_others() -> None:
    residency = Residency(30, "test")
    with residency.open() as lease:
        assert lease.get("sum", 10, lambda: put(lease, "a") + put(lease, "b")) == "ab"
        assert residency.stats().held_bytes == 30


def test_who_waits_for_a_value_does_not_stand_in_the_way_of_the_one_who_makes_it() -> None:
    residency = Residency(20, "test")
    maker, waiter = residency.open(), residency.open()
    put(waiter, "a")
    started = threading.Event()

    def make() -> str:
        started.set()
        until(lambda: residency.stats().waits == 1)
        return put(maker, "b", 5)

    made = in_thread(lambda: maker.get("sum", 10, make))
    started.wait(10)
    waiting = in_thread(lambda: put(waiter, "sum"))
    assert isinstance(made.exception(10), QueueFull)
    assert waiting.result(10) == "sum"


def test_a_key_is_made_once_however_many_ask() -> None:
    residency = Residency(100, "test")
    made: list[str] = []
    go = threading.Event()

    def make() -> str:
        go.wait(10)
        made.append("a")
        return "a"

    futures = [in_thread(lambda: residency.open().get("a", 10, make)) for _ in range(6)]
    until(lambda: residency.stats().waits == 5)
    go.set()
    assert [future.result(10) for future in futures] == ["a"] * 6
    assert made == ["a"]


def test_other_keys_are_made_meanwhile() -> None:
    residency = Residency(100, "test")
    go = threading.Event()
    slow = in_thread(lambda: residency.open().get("slow", 10, lambda: go.wait(10)))
    until(lambda: is_there(residency, "slow"))
    assert put(residency.open(), "quick") == "quick"
    go.set()
    assert slow.result(10)


def test_what_fails_is_not_kept_and_the_next_tries_again() -> None:
    residency = Residency(20, "test")
    attempts = iter([ValueError("no"), None])

    def make() -> str:
        if (error := next(attempts)) is not None:
            raise error
        return "a"

    with residency.open() as lease, pytest.raises(ValueError, match="no"):
        lease.get("a", 20, make)
    assert residency.stats().bytes == 0
    with residency.open() as lease:
        assert lease.get("a", 20, make) == "a"


def test_nothing_at_all_is_a_value() -> None:
    residency = Residency(0, "test")
    calls: list[int] = []
    for _ in range(2):
        with residency.open() as lease:
            assert lease.get("none", 0, lambda: calls.append(1)) is None
    assert calls == [1]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(20, 60))
def test_crowds_stay_within_the_budget_and_never_stand_still(seed: int, budget: int) -> None:
    residency = Residency(budget, "test")
    being_made: set[int] = set()
    sizes = {key: random.Random(seed + key).randint(0, 20) for key in range(8)}

    def make(key: int) -> int:
        assert key not in being_made
        being_made.add(key)
        assert residency.stats().bytes <= budget
        time.sleep(0.0005)
        being_made.remove(key)
        return key

    def request(rng: random.Random) -> None:
        for _ in range(12):
            with residency.open() as lease:
                for key in rng.sample(range(8), rng.randint(1, 4)):
                    try:
                        assert lease.get(key, sizes[key], lambda key=key: make(key)) == key
                    except ScumbleError as error:
                        assert isinstance(error, QueueFull | Refused)  # noqa: PT017 - either may come
                        break

    futures = [in_thread(lambda i=i: request(random.Random(seed + i))) for i in range(4)]
    for future in futures:
        future.result(30)
    stats = residency.stats()
    assert stats.held_bytes == 0
    assert stats.bytes == sum(entry.nbytes for entry in residency._entries.values()) <= budget


def test_prefetching_happens_beside_and_its_failures_do_not_matter() -> None:
    prefetcher, done = Prefetcher(), threading.Event()
    prefetcher.submit(lambda: 1 / 0)
    prefetcher.submit(done.set)
    assert done.wait(10)
    prefetcher.close()


def test_too_much_to_prefetch_is_forgotten_and_closing_does_not_wait_for_it() -> None:
    prefetcher, started, go = Prefetcher(), threading.Event(), threading.Event()
    done: list[int] = []
    prefetcher.submit(lambda: (started.set(), go.wait(10)))
    started.wait(10)
    for i in range(2 * CAPACITY):
        prefetcher.submit(lambda i=i: done.append(i))
    threading.Timer(0.1, go.set).start()
    closing = in_thread(prefetcher.close)
    closing.result(10)
    assert len(done) <= CAPACITY
