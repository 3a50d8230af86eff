"""What a module makes of a weight: PEFT's DoRA, torch's kron and plain numpy are the oracles."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scumble_registry.formats.lora.record import Dense, Gain, Kronecker, Magnitude, make_module
from scumble_server.factors.deltas import bias_change, change, delta


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.5, 1.0, 7.0]))
def test_a_lora_adds_its_product_times_alpha_over_rank(rank: int, rows: int, columns: int, alpha: float) -> None:
    down, up = draw(rank, columns), draw(rows, rank)
    module = make_module("unet.a", down, up, alpha)
    found = change(torch.zeros(rows, columns), module)
    np.testing.assert_allclose(found, alpha / rank * up @ down, rtol=1e-4, atol=1e-5)


def test_a_convolution_s_taps_stay_where_they_are() -> None:
    layer = nn.Conv2d(3, 5, 3, bias=False)
    down, up = draw(2, 3, 3, 3), draw(5, 2, 1, 1)
    x = torch.from_numpy(draw(1, 3, 6, 6))
    expected = nn.functional.conv2d(nn.functional.conv2d(x, torch.from_numpy(down)), torch.from_numpy(up))
    found = nn.functional.conv2d(x, delta(layer.weight.data, make_module("unet.a", down, up, 2.0)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_first_convolution_that_reads_more_leaves_what_is_more_alone() -> None:
    module = make_module("unet.conv_in", draw(2, 4, 3, 3), draw(5, 2, 1, 1), 2.0)
    found, narrow = delta(torch.zeros(5, 9, 3, 3), module), delta(torch.zeros(5, 4, 3, 3), module)
    assert torch.equal(found[:, :4], narrow)
    assert not found[:, 4:].any()


def test_kronecker_factors_are_torchs_kron() -> None:
    left, right = draw(2, 3), draw(3, 2)
    found = change(torch.zeros(6, 6), Kronecker(left, right))
    torch.testing.assert_close(found, torch.kron(torch.from_numpy(left), torch.from_numpy(right)))


def test_a_gain_scales_and_a_bias_is_added() -> None:
    weight, bias = torch.from_numpy(draw(4, 3)), torch.from_numpy(draw(4))
    gain = Gain(np.array([0.0, 1.0, -1.0, 0.5], np.float32), axis=0)
    torch.testing.assert_close(change(weight, gain), weight * torch.tensor([0.0, 1.0, -1.0, 0.5])[:, None])
    assert bias_change(bias, gain) is None
    added = Dense(draw(4, 3, seed=1), bias=draw(4, seed=2))
    torch.testing.assert_close(bias_change(bias, added), torch.from_numpy(draw(4, seed=2)))


@pytest.mark.parametrize("rank", [1, 3])
def test_a_dora_is_pefts(rank: int) -> None:
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(6, 5, bias=False))
    weight = base[0].weight.detach().clone()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    layer = model.base_model.model[0]
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data *= 1 + 0.3 * torch.randn_like(magnitude)
    down, up = (part["default"].weight.detach().numpy() for part in (layer.lora_A, layer.lora_B))
    module = make_module("unet.a", down, up, 2.0 * rank, Magnitude(magnitude.detach().numpy(), 0))
    merged = model.merge_and_unload()[0].weight.detach()
    torch.testing.assert_close(weight + change(weight, module), merged, atol=1e-5, rtol=1e-5)
