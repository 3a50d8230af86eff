"""AND and its weights, as the webui reads them."""

from __future__ import annotations

import pytest

from scumble_server.prompts.grammar.composition import parse_composition

CASES = {
    "a": [("a", 1.0)],
    "": [("", 1.0)],
    "a AND b": [("a", 1.0), (" b", 1.0)],
    "left AND right:0.5": [("left", 1.0), (" right", 0.5)],
    "a AND b AND c:2": [("a", 1.0), (" b", 1.0), (" c", 2.0)],
    "a :1.2 AND b : -.5 ": [("a", 1.2), (" b", -0.5)],
    "a:1. AND b:+2": [("a", 1.0), (" b", 2.0)],
    "a AND": [("a", 1.0), ("", 1.0)],
    "SAND AND LAND": [("SAND", 1.0), (" LAND", 1.0)],
    "a and b": [("a and b", 1.0)],
    "(a:1.2) AND b": [("(a:1.2)", 1.0), (" b", 1.0)],
    "a\nb :2": [("a\nb", 2.0)],
}


@pytest.mark.parametrize("prompt", CASES)
def test_parts_and_weights(prompt: str) -> None:
    assert parse_composition(prompt) == CASES[prompt]
