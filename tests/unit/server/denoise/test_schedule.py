"""Who steps next: the most urgent images, and each group in its turn."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble_server.denoise.image import ActiveRequest, Conditioning, Image
from scumble_server.denoise.noise import Noise
from scumble_server.denoise.phase import Phase
from scumble_server.denoise.schedule import PATIENCE, Turns, most_urgent
from scumble_server.denoise.schedulers import table

CONFIG = {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
TABLE = table("euler", CONFIG, 4)
EXECUTORS: list[Any] = [object() for _ in range(3)]


def image(executor: int = 0, size: int = 8, step: int = 0, **request: Any) -> Image:
    active = ActiveRequest(lambda _: None, lambda: False, lambda _: None, **{"queued_at": 0.0, **request})
    phase = Phase(EXECUTORS[executor], torch.zeros(1, 1, 1))
    conditioning = Conditioning((phase,), (0,) * 4, frozenset())
    made = Image(active, conditioning, TABLE, 1.0, torch.zeros(4, size, size), Noise(0, size, size))
    made.step = step
    return made


def test_priority_goes_first_then_who_has_begun_then_the_nearest_deadline_then_who_came_first() -> None:
    order = [
        image(priority=1, queued_at=5.0),
        image(step=2, queued_at=4.0),
        image(deadline=9.0, queued_at=3.0),
        image(deadline=10.0, queued_at=2.0),
        image(queued_at=0.0),
        image(queued_at=1.0),
    ]
    assert most_urgent(list(reversed(order)), 9, now=6.0) == order
    assert most_urgent(list(reversed(order)), 2, now=6.0) == order[:2]


def test_waiting_weighs_as_much_as_priority() -> None:
    old, urgent = image(queued_at=0.0), image(priority=1, queued_at=2 * PATIENCE)
    assert most_urgent([old, urgent], 1, now=2 * PATIENCE) == [old]
    joined = image(queued_at=0.0, joined_at=1.0)
    assert most_urgent([joined, urgent], 1, now=2 * PATIENCE) == [urgent], "what runs waits no more"


def test_images_of_one_group_have_the_same_weights_and_size() -> None:
    images = [image(), image(1), image(size=16), image()]
    assert Turns().next_of(images) == [images[0], images[3]]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_while_groups_join_none_waits_longer_than_all_others_take(joining: list[int]) -> None:
    turns = Turns()
    members = {group: image(group) for group in range(3)}
    waited = dict.fromkeys(range(3), 0)
    present: set[int] = set()
    for joined in joining:
        present.add(joined)
        (stepped,) = turns.next_of([members[group] for group in sorted(present)])
        for group, member in members.items():
            waited[group] = waited[group] + 1 if group in present and member is not stepped else 0
        assert max(waited.values()) < 3


def test_a_group_that_stays_is_not_starved_by_a_busy_one() -> None:
    turns, rare = Turns(), image(1)
    stepped = [turns.next_of([image(), image(), rare])[0] is rare for _ in range(6)]
    assert sum(stepped) == 3


def test_of_no_images_nobody_steps() -> None:
    assert Turns().next_of([]) == []
