"""Work ahead: nobody waits for it, nothing depends on it, and it ends with its owner."""

from __future__ import annotations

import threading

from scumble_server.memory.prefetch import CAPACITY, Prefetcher


def test_what_fails_does_not_stop_what_comes_behind() -> None:
    done = threading.Event()
    prefetcher = Prefetcher()

    def fail() -> None:
        raise OSError

    prefetcher.submit(fail)
    prefetcher.submit(done.set)
    assert done.wait(10)
    prefetcher.close()


def test_too_much_is_left_undone_and_closing_forgets_what_waits() -> None:
    prefetcher, begun, go = Prefetcher(), threading.Event(), threading.Event()
    ran: list[int] = []

    def hold() -> None:
        begun.set()
        go.wait(10)

    prefetcher.submit(hold)
    assert begun.wait(10)
    for number in range(CAPACITY - 1):
        prefetcher.submit(lambda number=number: ran.append(number))
    closing = threading.Thread(target=prefetcher.close)
    closing.start()
    for _ in range(10 * CAPACITY):
        prefetcher.submit(lambda: ran.append(-1))  # never waits, though there is no room
    go.set()
    closing.join(10)
    assert not closing.is_alive()
    assert not ran
