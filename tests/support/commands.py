"""The command line as a test runs it."""

import json
from collections.abc import Callable
from typing import Any

Scumble = Callable[..., tuple[int, str, str]]
"""`status, stdout, stderr = scumble("ls", "--json")`."""


def as_json(output: tuple[int, str, str]) -> Any:
    status, out, _ = output
    assert status == 0
    return json.loads(out)
