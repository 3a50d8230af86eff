"""How long a search of hypothesis goes on: briefly in every test run, longer in `make fuzz`."""

from __future__ import annotations

import os

TIMES = "SCUMBLE_SEARCH"
"""Variable of the environment: how many times as many examples are tried."""


def examples(usual: int) -> int:
    """`max_examples` of a search that tries `usual` ones in a test run."""
    return usual * int(os.environ.get(TIMES, "1"))
