"""The flat layout: targets do not overlap, small ones come first, and what fits one layout fits its like."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble.errors import Refused
from scumble_build.graphs.layout import ALIGN, PAGE, RANK_BUCKETS, Layout, TargetShape, pages_for, rank_bucket

SHAPES = st.lists(
    st.builds(
        TargetShape, st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.integers(1, 90), st.integers(1, 90), st.booleans()
    ),
    max_size=12,
    unique_by=lambda shape: shape.name,
)


@settings(deadline=None)
@given(shapes=SHAPES)
def test_targets_stand_side_by_side_and_small_ones_come_first(shapes: list[TargetShape]) -> None:
    layout = Layout.of(shapes)
    small = {shape.name for shape in shapes if shape.small}
    assert layout.targets.keys() == {shape.name for shape in shapes}
    in_end = out_end = 0
    for target in layout.targets.values():
        assert target.in_offset % ALIGN == target.out_offset % ALIGN == 0
        assert in_end <= target.in_offset < in_end + ALIGN
        assert out_end <= target.out_offset < out_end + ALIGN
        in_end, out_end = target.in_end, target.out_end
        assert (target.name in small) == (target.in_end <= layout.small.total_in)
    assert in_end <= layout.full.total_in < in_end + ALIGN
    assert (layout.rest.total_in, layout.rest.total_out) == (
        layout.full.total_in - layout.small.total_in,
        layout.full.total_out - layout.small.total_out,
    )


@settings(deadline=None)
@given(shapes=SHAPES, data=st.data())
def test_the_extent_of_some_targets_holds_all_of_them(shapes: list[TargetShape], data: st.DataObject) -> None:
    layout = Layout.of(shapes)
    names = data.draw(st.lists(st.sampled_from([shape.name for shape in shapes] or ["x"])))
    extent = layout.extent([*names, "elsewhere"])
    assert all(layout.targets[name].in_end <= extent.total_in for name in names if name in layout.targets)
    far = any(not shape.small for shape in shapes if shape.name in names)
    assert extent == (layout.full if far else layout.small)


def test_the_digest_names_targets_and_their_places() -> None:
    one, other = TargetShape("a", 3, 4), TargetShape("b", 3, 4, small=False)
    assert Layout.of([one, other]).digest == Layout.of([other, one]).digest, "small ones come first anyway"
    different = [[one], [TargetShape("a", 3, 40), other], [TargetShape("c", 3, 4), other]]
    assert len({Layout.of(shapes).digest for shapes in [[one, other], *different]}) == 4


@given(rank=st.integers(0, RANK_BUCKETS[-1]))
def test_a_bucket_is_the_smallest_that_holds_the_rank_in_whole_pages(rank: int) -> None:
    bucket = rank_bucket(rank)
    assert rank <= bucket and bucket % PAGE == 0
    assert not any(rank <= smaller < bucket for smaller in RANK_BUCKETS)
    assert pages_for(rank) * PAGE in range(rank, rank + PAGE)


def test_beyond_the_largest_bucket_a_rank_is_refused_with_the_numbers() -> None:
    with pytest.raises(Refused, match="257 rank columns together, the largest bucket is 256") as refused:
        rank_bucket(257)
    assert (refused.value.fields["rank"], refused.value.fields["largest"]) == (257, 256)
