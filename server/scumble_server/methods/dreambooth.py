"""DreamBooth: a checkpoint is another set of weights that the request is drawn with (`variants.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scumble.errors import Incompatible, InvalidRequest
from scumble_registry.compatibility import DreamboothCompatibility
from scumble_registry.formats.dreambooth import KIND
from scumble_server.base import Base
from scumble_server.request.adapter import Bound
from scumble_server.request.settings import Settings

FIELDS: frozenset[str] = frozenset()


def read_record(path: Path) -> None:
    """There is none: what is kept of a checkpoint is read straight into the device."""


def check(bound: Bound, base: Base) -> None:
    """It is a difference to one base, and it is there or not. Raises Incompatible, InvalidRequest."""
    if bound.version.manifest.base != base.version.digest:
        raise Incompatible(
            f"{bound.version.ref} is a checkpoint of another version of the base ({bound.version.manifest.base}); "
            f"publish it again with --base {base.version.ref}",
            ref=bound.spec.ref,
        )
    if bound.spec.weight not in {0, 1}:
        raise InvalidRequest(
            f"{bound.spec.ref} is a checkpoint, whose weight is 1 or 0, not {bound.spec.weight:g}; for shades of it "
            f"make a LoRA: scumble registry extract {bound.version.ref} --rank 64 --name ns/name",
            field="adapters.weight",
        )


def check_together(adapters: Sequence[Bound], base: Base, settings: Settings) -> None:  # noqa: ARG001 - the protocol's
    if len(adapters) > 1:
        raise InvalidRequest(
            f"{' and '.join(bound.spec.ref for bound in adapters)} are checkpoints; a request is drawn with one",
            field="adapters",
        )


def idle(bound: Bound, steps: int) -> str | None:  # noqa: ARG001 - it acts in every step
    return None if bound.spec.weight else "weight 0"


def describe(bound: Bound) -> dict[str, Any]:
    return {"changed": compatibility_of(bound).changed}


def compatibility_of(bound: Bound) -> DreamboothCompatibility:
    compatibility = bound.version.manifest.compatibility
    assert isinstance(compatibility, DreamboothCompatibility)
    return compatibility


def scheduler_config(adapters: Sequence[Bound], base: Base) -> dict[str, Any]:
    """The checkpoint's own, if there is one: it may predict something else than the base."""
    own = next((compatibility_of(bound).scheduler for bound in adapters if bound.kind == KIND), None)
    return base.scheduler_config if own is None else dict(own)


__all__ = [
    "FIELDS",
    "KIND",
    "check",
    "check_together",
    "compatibility_of",
    "describe",
    "idle",
    "read_record",
    "scheduler_config",
]
