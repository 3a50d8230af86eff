"""The typed client against a real server."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import scumble
from scumble import Client, Done, Step


def test_progress_comes_in_order_and_ends_with_the_picture(client: Client) -> None:
    *progress, last = client.images.stream("a cup", steps=5, seed=1)
    steps = [event for event in progress if isinstance(event, Step)]
    assert steps == [Step(step, 5) for step in range(1, 6)]
    assert isinstance(last, Done)
    assert last.images.shape == (1, 64, 64, 3)


def test_requests_of_many_threads_share_steps_and_equal_the_same_ones_alone(client: Client) -> None:
    def picture(seed: int) -> scumble.Images:
        return client.images.generate("a cup", seed=seed, steps=12, adapters=[f"l/{'ab'[seed % 2]}:0.7"])

    before = client.stats()
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(picture, range(8)))
    after = client.stats()
    assert after.steps - before.steps < 8 * 12
    assert after.mixed_steps > before.mixed_steps
    assert set(map(type, after.batch_sizes)) == {int}
    for seed in (0, 5):
        assert np.abs(picture(seed).images.astype(int) - together[seed].images).max() <= 1


def test_closing_a_stream_takes_the_request_back(client: Client) -> None:
    stream = client.images.stream("a cup", steps=500)
    while not isinstance(next(stream), Step):
        pass
    stream.close()
    assert idles(client), "the loop went on with a request that was taken back"


def idles(client: Client) -> bool:
    """Whether the loop stops stepping long before the last step."""
    for _ in range(50):
        steps = client.stats().steps
        time.sleep(0.2)
        if client.stats().steps == steps:
            return True
    return False


def test_a_refusal_has_its_type_and_leaves_the_server_well(client: Client) -> None:
    with pytest.raises(scumble.NotFound, match="l/missing"):
        client.images.generate("a cup", adapters=["l/missing"])
    with pytest.raises(scumble.InvalidRequest):
        client.images.generate("a cup", width=2048, height=2048)
    assert client.health() == scumble.Health(live=True, ready=True)
    assert len(client.images.generate("a cup", steps=1)) == 1


def test_a_full_queue_is_waited_out(client: Client) -> None:
    """The server holds 16 open requests; 32 callers all get their picture in the end."""
    with ThreadPoolExecutor(32) as threads:
        pictures = list(threads.map(lambda seed: client.images.generate("", seed=seed, steps=4), range(32)))
    assert [images.receipt.seeds for images in pictures] == [(seed,) for seed in range(32)]
