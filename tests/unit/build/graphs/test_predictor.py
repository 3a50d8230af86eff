"""The predictor of LoRAs against its formula written down in plain matrix products on the stored tensors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from scumble_build.graphs.predictor import Predictor
from scumble_registry.formats.hypernetwork import read_record
from scumble_registry.formats.hypernetwork.predictor import PredictorRecord
from support.tiny_hypernetwork import make_predictor, save_predictor

TARGETS = {"unet.a.attn1.to_q": (8, 6), "unet.b.attn2.to_k": (10, 12), "unet.c.proj_in": (7, 9, 1, 1)}
CONDITION = 11


def published(predictor: Predictor, folder: Path) -> PredictorRecord:
    record = read_record(save_predictor(predictor, folder / "a.safetensors"))
    assert isinstance(record, PredictorRecord)
    return record


def by_hand(record: PredictorRecord, condition: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Pre-norm transformer decoder (Xiong et al., 2002.04745) with products only. condition (N, C)."""
    config = record.config
    weights = {name: torch.tensor(np.array(values)).double() for name, values in record.network.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(name: str, x: Tensor, y: Tensor) -> Tensor:
        projections = zip(
            (x, y, y), weights[f"{name}.in_proj_weight"].chunk(3), weights[f"{name}.in_proj_bias"].chunk(3), strict=True
        )
        q, k, v = (
            (each @ w.T + bias).unflatten(-1, (config.heads, -1)).transpose(0, 1) for each, w, bias in projections
        )
        mixed = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return linear(f"{name}.out_proj", mixed.transpose(0, 1).flatten(1))

    memory = linear("condition", condition.double())
    c = torch.zeros(len(config.targets), config.rank * (config.a + config.b), dtype=torch.float64)
    for _ in range(config.passes):
        x = weights["queries"] + linear("feedback", c)
        for layer in range(config.depth):
            at = f"decoder.layers.{layer}"
            of_own = norm(f"{at}.norm1", x)
            x = x + attention(f"{at}.self_attn", of_own, of_own)
            x = x + attention(f"{at}.multihead_attn", norm(f"{at}.norm2", x), memory)
            x = x + linear(f"{at}.linear2", gelu(linear(f"{at}.linear1", norm(f"{at}.norm3", x))))
        c = linear("head", norm("decoder.norm", x))
    split = config.a * config.rank
    return {
        target: (
            c[i, split:].view(config.rank, config.b) @ torch.tensor(np.array(record.down[target])).double(),
            torch.tensor(np.array(record.up[target])).double() @ c[i, :split].view(config.a, config.rank),
        )
        for i, target in enumerate(config.targets)
    }


@pytest.mark.parametrize(("passes", "depth", "rank"), [(1, 1, 1), (3, 2, 2)])
def test_predicted_factors_are_those_of_the_formula(passes: int, depth: int, rank: int, tmp_path: Path) -> None:
    record = published(make_predictor(TARGETS, CONDITION, passes=passes, depth=depth, rank=rank), tmp_path)
    condition = torch.randn(13, CONDITION)
    found, wanted = Predictor.of(record).predict(condition[None]), by_hand(record, condition)
    assert list(found) == sorted(TARGETS)
    for target, (down, up, alpha) in found.items():
        out, in_, *_ = TARGETS[target]
        assert (up.shape, down.shape, alpha) == ((out, rank), (rank, in_), 3.0)
        for mine, theirs in zip((down, up), wanted[target], strict=True):
            assert (mine - theirs).abs().max() <= 1e-5
            assert theirs.abs().max() >= 0.05


def test_what_a_trainer_stores_predicts_the_same(tmp_path: Path) -> None:
    trained = make_predictor(TARGETS, CONDITION, seed=5)
    condition = torch.randn(1, 4, CONDITION)
    read = Predictor.of(published(trained, tmp_path)).predict(condition)
    for target, (down, up, _) in trained.predict(condition).items():
        assert torch.allclose(read[target][0], down, atol=1e-6)
        assert torch.allclose(read[target][1], up, atol=1e-6)


def test_gradients_reach_all_that_is_trained_and_no_auxiliary() -> None:
    predictor = make_predictor(TARGETS, CONDITION).requires_grad_(True)
    factors = predictor.expand(predictor(torch.randn(1, 4, CONDITION))[0])
    sum((up @ down).square().sum() for down, up, _ in factors.values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in predictor.parameters())
    assert not any("up_" in name or "down_" in name for name, _ in predictor.named_parameters())


def test_loading_draws_nothing_at_random(tmp_path: Path) -> None:
    record = published(make_predictor(TARGETS, CONDITION), tmp_path)
    state = torch.get_rng_state()
    Predictor.of(record)
    assert torch.equal(torch.get_rng_state(), state)
