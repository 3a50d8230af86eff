"""Statistics are plain JSON, and a newer server may count more."""

from __future__ import annotations

import json

from scumble.stats import LoopStats

COUNTS = dict.fromkeys(LoopStats.model_fields, 1) | {"batch_sizes": {"2": 3}, "step_seconds": 0.5}


def test_batch_sizes_are_numbers_again() -> None:
    assert LoopStats.model_validate(COUNTS).batch_sizes == {2: 3}
    assert LoopStats.model_validate_json(json.dumps(COUNTS)).batch_sizes == {2: 3}


def test_what_a_newer_server_counts_is_kept() -> None:
    newer = LoopStats.model_validate({**COUNTS, "naps": 4})
    assert newer.model_dump()["naps"] == 4
