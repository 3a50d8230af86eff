"""Refuses functions, methods, classes and constants that no product file uses: tests alone keep nothing alive.

Fields and arguments are left out: models are written whole, and others' protocols name arguments that we ignore.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from vulture.core import Item, Vulture

PYTHON, TRITON, TENSORRT = "Python calls it", "Triton calls it", "TensorRT calls it"
CONTRACT = "the wire's contract, to which a test holds config.pbtxt"
BY_NAME = "loaded by its name, from a table or an entry point"
ALLOWED = {
    "__getattr__": PYTHON,
    "__dir__": PYTHON,
    "readable": PYTHON,
    "readinto": PYTHON,
    "connect_unix_socket": "httpcore calls it",
    "initialize": TRITON,
    "send_400_response": "uvicorn calls it",
    "phase_start": TENSORRT,
    "step_complete": TENSORRT,
    "phase_finish": TENSORRT,
    "downgrade": "alembic calls it",
    **dict.fromkeys(("handle_error", "log_message"), "http.server calls it"),
    "STREAM_OUTPUTS": CONTRACT,
    "serve": BY_NAME,
    "prepare_style": BY_NAME,
    **dict.fromkeys(("TextualInversionTraining", "DreamboothTraining"), BY_NAME),
    **dict.fromkeys(("IpAdapterTraining", "ControlNetTraining"), BY_NAME),
}
DECORATORS = [
    "@*.command",
    "@*.command*",
    "@field_validator",
    "@model_validator",
    "@model_serializer",
    "@*.get",
    "@*.post",
    "@*.exception_handler",
]


def matters(item: Item) -> bool:
    return item.typ in ("function", "method", "property", "class", "import", "unreachable_code") or (
        item.typ == "variable" and item.name.isupper()
    )


def main() -> int:
    config = tomllib.loads(Path("pyproject.toml").read_text())
    packages = config["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    vulture = Vulture(ignore_decorators=DECORATORS)
    vulture.scavenge([*packages, "model_repository", "benches"])
    unused = [item for item in vulture.get_unused_code(min_confidence=60) if matters(item)]
    for item in unused:
        if item.name not in ALLOWED:
            print(f"{item.filename}:{item.first_lineno}: unused {item.typ} {item.name!r}")
    idle = sorted(ALLOWED.keys() - {item.name for item in unused})
    if idle:
        print(f".ci/dead_code.py: no longer unused, or gone: {', '.join(idle)}")
    return bool(idle or any(item.name not in ALLOWED for item in unused))


if __name__ == "__main__":
    sys.exit(main())
