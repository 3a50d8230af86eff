"""Phases: what stays the same from step to step is one phase, and each step has what it alone would have."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from scumble.request import Adapter
from scumble_server.admission.phases import plan_phases
from scumble_server.request.adapter import ResolvedAdapter

SHARES = st.sampled_from([0.0, 0.2, 0.25, 0.5, 0.8, 1.0])
NO_VERSION: Any = None  # phases go by what is asked, not by what is bound


@st.composite
def adapters(draw: st.DrawFn) -> ResolvedAdapter:
    start, end = sorted((draw(SHARES), draw(SHARES)))
    spec = Adapter(ref="a/b", weight=draw(st.sampled_from([-1.0, 0.0, 0.5])), start=start, end=end)
    return ResolvedAdapter(spec, NO_VERSION, None)


TEXTS = st.lists(st.sampled_from([(0,), (0, 1), (0, 2)]), min_size=1, max_size=12)


@settings(deadline=None)
@given(acting=st.lists(adapters(), max_size=3), texts=TEXTS)
def test_every_step_has_its_own_weights_and_texts_and_equal_steps_share_a_phase(
    acting: list[ResolvedAdapter], texts: list[tuple[int, ...]]
) -> None:
    schedule = plan_phases(acting, texts)
    steps = len(texts)
    asked = []
    for step, number in enumerate(schedule.phase_of_step):
        phase = schedule.phases[number]
        expected = {each: each.spec.weight if each.spec.is_active(step, steps) else 0.0 for each in acting}
        assert (dict(phase.weights), phase.texts) == (expected, texts[step])
        asked.append((tuple(expected.values()), texts[step]))
    assert len(schedule.phases) == len(set(asked))
    assert set(schedule.phase_of_step) == set(range(len(schedule.phases)))


def test_an_adapter_that_starts_half_way_makes_two_phases() -> None:
    late = ResolvedAdapter(Adapter(ref="a/b", start=0.5), NO_VERSION, None)
    schedule = plan_phases([late], [(0, 1)] * 6)
    assert schedule.phase_of_step == (0, 0, 0, 1, 1, 1)
    assert [phase.weights[late] for phase in schedule.phases] == [0.0, 1.0]
