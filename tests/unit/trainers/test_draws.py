"""What is random in a step depends on seed and step alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from scumble_trainers.draws import Draw, draw_step, picture_order, pictures_of_step


def step(seed: int, number: int, batch: int = 8) -> Draw:
    return draw_step(
        seed,
        number,
        pictures=torch.arange(batch),
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


@given(step=st.integers(0, 30), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4), batch=st.integers(1, 6))
def test_a_batch_holds_pictures_of_one_size_only(step: int, sizes: list[int], batch: int) -> None:
    groups = [torch.arange(size) + 100 * index for index, size in enumerate(sizes)]
    chosen = pictures_of_step(1, step, batch, groups)
    assert len(chosen) == batch
    assert len(set((chosen // 100).tolist())) == 1


def test_in_a_round_every_picture_of_every_size_is_shown() -> None:
    groups = [torch.arange(8), torch.arange(100, 104), torch.arange(200, 202)]
    shown = [pictures_of_step(1, step, 2, groups).tolist() for step in range(14)]
    for turn in (shown[:7], shown[7:]):
        assert sorted(picture for batch in turn for picture in batch) == [*range(8), *range(100, 104), 200, 201]
    assert shown[:7] != shown[7:]
