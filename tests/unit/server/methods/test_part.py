"""Parts of a phase: halves are spread over rows, and texts of different lengths are stacked behind a mask."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from scumble_server.methods.part import BatchRows, spread, stack_text


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=4))
def test_attention_to_a_stacked_text_is_attention_to_each_alone(shapes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    texts = [torch.randn(rows, length, 4) for rows, length in shapes]
    stacked, mask = stack_text(texts)
    assert (mask is None) == (len({length for _, length in shapes}) == 1)
    query = torch.randn(len(stacked), 2, 4)
    together = scaled_dot_product_attention(query, stacked, stacked, None if mask is None else mask[:, None])
    start = 0
    for text in texts:
        rows = slice(start, start := start + len(text))
        alone = scaled_dot_product_attention(query[rows], text, text)
        torch.testing.assert_close(together[rows], alone, atol=1e-5, rtol=1e-5)


def test_the_last_half_is_repeated_for_every_further_prompt() -> None:
    halves = torch.tensor([[1.0], [2.0]])
    assert spread(halves, 4).tolist() == [[1], [2], [2], [2]]
    assert spread(halves, 2) is halves
    assert spread(halves[:1], 1).tolist() == [[1]]


def test_an_image_begins_where_the_rows_before_it_end() -> None:
    assert BatchRows((2, 1, 3), "cpu").starts == [0, 2, 3]
