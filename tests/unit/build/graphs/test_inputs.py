"""What rows carry into a step: which graph it needs, where it lies, and what an LLLite leaves alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scumble_build.graphs.adapted import Factors, Pages
from scumble_build.graphs.inputs import ImageInputs, LiteInputs, StepInputs, level_sizes
from scumble_build.graphs.lllite import LLLite


def pages() -> Pages:
    return Pages(torch.zeros(1, 8), torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int64))


def test_what_is_carried_names_what_the_graph_must_take() -> None:
    kv = torch.zeros(1, 3, 4)
    assert StepInputs(kv, kv_mask=torch.ones(1, 3, dtype=torch.bool), pooled=kv).includes == frozenset()
    plain = Factors(pages(), None, torch.zeros(1, 8))
    assert StepInputs(kv, factors=plain).includes == {"factors"}
    everything = Factors(pages(), pages(), torch.zeros(1, 8), stretch_out=torch.zeros(1), stretch_in=torch.zeros(1))
    images = ImageInputs(torch.tensor([0]), torch.zeros(1, 1, 1, 4), None, torch.ones(1, 1))
    inputs = StepInputs(kv, factors=everything, images=images, residuals=(kv,), features=(kv,))
    assert inputs.includes == {"factors", "full", "stretch_out", "stretch_in", "images", "residuals", "features"}


def test_half_precision_leaves_sizes_and_whole_numbers_as_they_are() -> None:
    sizes = torch.tensor([[1537.0, 1025, 0, 0, 1537, 1025]])
    images = ImageInputs(torch.tensor([0]), torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1) > 0, torch.ones(1, 1))
    moved = StepInputs(torch.zeros(1, 3, 4), images=images, sizes=sizes).to(torch.device("cpu"), torch.float16)
    assert moved.kv.dtype == torch.float16
    assert moved.sizes is not None and torch.equal(moved.sizes, sizes)
    assert moved.images is not None and moved.images.tokens is not None
    assert (moved.images.kv.dtype, moved.images.rows.dtype) == (torch.float16, torch.int64)
    assert moved.images.tokens.dtype == torch.bool


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4))
def test_levels_are_what_downsamplers_make(height: int, width: int, levels: int) -> None:
    x, sizes = torch.zeros(1, 1, height, width), []
    for _ in range(levels):
        sizes.append(tuple(x.shape[2:]))
        x = nn.functional.conv2d(x, torch.zeros(1, 1, 3, 3), stride=2, padding=1)
    assert level_sizes(height, width, levels) == sizes


def test_an_lllite_changes_the_rows_and_targets_that_it_is_for() -> None:
    torch.manual_seed(0)
    names = {"down.0": (3, 4), "mid.0": (3, 3 + 2), "up.0": (4, 3)}
    own = {f"{name}.weight": torch.randn(shape) for name, shape in names.items()}
    own |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in names.items()}
    net = LLLite({"unet.a.to_q": own})
    embeddings = {"unet.a.to_q": torch.randn(2, 6, 2)}
    lite = LiteInputs(torch.tensor([0, 2]), net, embeddings, torch.tensor([1.0, 0.5]))
    x = torch.randn(3, 6, 4)
    assert lite.change("unet.b.to_q", x) is x
    changed = lite.change("unet.a.to_q", x)
    assert torch.equal(changed[1], x[1])
    added = net.change("unet.a.to_q", x[[0, 2]], embeddings["unet.a.to_q"])
    torch.testing.assert_close(changed[0], x[0] + added[0])
    torch.testing.assert_close(changed[2], x[2] + 0.5 * added[1])
