"""What is random in a step depends on seed and step alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from scumble_trainers.draws import Draw, draw_step, picture_order


def step(seed: int, number: int, batch: int = 8) -> Draw:
    return draw_step(
        seed,
        number,
        batch=batch,
        pictures=5,
        latent_shape=(4, 2, 2),
        train_timesteps=1000,
        caption_dropout=0.5,
    )


def test_the_same_seed_and_step_draw_the_same() -> None:
    assert torch.equal(step(1, 7).noise, step(1, 7).noise)
    assert not torch.equal(step(1, 7).noise, step(1, 8).noise)
    assert not torch.equal(step(1, 7).noise, step(2, 7).noise)


@given(first=st.integers(0, 500), count=st.integers(1, 50), pictures=st.integers(1, 40), cut=st.integers(1, 49))
def test_the_order_of_pictures_is_one_endless_sequence(first: int, count: int, pictures: int, cut: int) -> None:
    whole = picture_order(3, first, count + cut, pictures)
    parts = [picture_order(3, first, count, pictures), picture_order(3, first + count, cut, pictures)]
    assert torch.equal(whole, torch.cat(parts))


@given(epoch=st.integers(0, 20), pictures=st.integers(1, 40))
def test_each_epoch_shows_every_picture_once(epoch: int, pictures: int) -> None:
    assert sorted(picture_order(0, epoch * pictures, pictures, pictures).tolist()) == list(range(pictures))


def test_timesteps_cover_the_schedule_evenly() -> None:
    timesteps = step(0, 0, batch=10).timesteps.sort().values
    assert (timesteps // 100).tolist() == list(range(10))


def test_parts_together_are_the_batch() -> None:
    whole = step(0, 3)
    parts = [whole.part(index, 4) for index in range(4)]
    assert sorted(torch.cat([part.timesteps for part in parts]).tolist()) == sorted(whole.timesteps.tolist())
    assert all(len(part.noise) == len(part.captions) == 2 for part in parts)
