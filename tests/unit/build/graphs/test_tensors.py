"""The tensors of a record have paths, and can be changed all at once."""

from __future__ import annotations

import torch

from scumble_build.graphs.adapted import Factors, Pages
from scumble_build.graphs.inputs import LiteInputs, NetInputs, StepInputs
from scumble_build.graphs.lllite import LLLite
from scumble_build.graphs.tensors import tensors_of, with_tensors

CPU = torch.device("cpu")
LLLITE = LLLite({})


def inputs() -> StepInputs:
    pages = Pages(torch.randn(3, 6), torch.randn(3, 5), torch.ones(2, 1, dtype=torch.int64))
    return StepInputs(
        torch.randn(2, 3, 4),
        factors=Factors(pages, None, torch.ones(2, 8), rows_per_set=2),
        residuals=(torch.randn(2, 2), torch.randn(2, 1)),
        lites=(LiteInputs(torch.tensor([1]), LLLITE, {"to_q": torch.randn(1, 2, 3)}, torch.ones(1)),),
        sizes=torch.tensor([[1537.0] * 6] * 2),
    )


def test_tensors_are_named_by_their_paths_and_can_be_put_back() -> None:
    record = inputs()
    named = dict(tensors_of(record))
    of_factors = {f"factors.{name}" for name in ("small.A", "small.B", "small.table", "scale")}
    of_lites = {f"lites.0.{name}" for name in ("rows", "embeddings.to_q", "weight")}
    assert set(named) == {"kv", *of_factors, "residuals.0", "residuals.1", *of_lites, "sizes"}
    again = with_tensors(record, {name: tensor + 1 for name, tensor in named.items()})
    assert torch.equal(again.residuals[1], record.residuals[1] + 1)  # type: ignore[index]
    assert torch.equal(again.lites[0].embeddings["to_q"], record.lites[0].embeddings["to_q"] + 1)
    assert again.factors is not None and again.factors.rows_per_set == 2
    assert again.lites[0].net is LLLITE
    assert again.kv_mask is None


def test_floats_are_cast_but_integers_and_sizes_are_not() -> None:
    moved = inputs().to(CPU, torch.float16)
    whole = {"factors.small.table": torch.int64, "lites.0.rows": torch.int64, "sizes": torch.float32}
    for path, tensor in tensors_of(moved):
        assert tensor.dtype == whole.get(path, torch.float16), path
    assert moved.sizes is not None and moved.sizes[0, 0] == 1537


def test_what_is_there_already_is_not_copied() -> None:
    record = NetInputs(torch.randn(2, 3, 4), torch.randn(2, 4, 2, 2), kv_mask=torch.ones(2, 3, dtype=torch.bool))
    moved = record.to(CPU, torch.float32)
    assert moved.kv is record.kv and moved.hint is record.hint and moved.kv_mask is record.kv_mask


def test_a_batch_says_which_inputs_its_graph_must_have() -> None:
    assert StepInputs(torch.randn(1, 3, 4)).includes == frozenset()
    assert inputs().includes == {"factors", "residuals"}
