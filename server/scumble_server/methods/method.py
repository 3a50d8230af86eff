"""What every adapter method has in common, so that admission and receipt need not know which one it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from scumble.errors import InvalidRequest
from scumble.request import Adapter
from scumble_server.base import Base
from scumble_server.request.adapter import Bound
from scumble_server.request.settings import Settings


class Method(Protocol):
    """A module of `methods/`, as admission and receipt see it. What its rows carry, `conditioning.py` asks it for."""

    KIND: str
    """The registry's word."""
    FIELDS: frozenset[str]
    """The fields of an adapter in a request that mean something to this method, beside `ref` and `weight`."""

    def read_record(self, path: Path) -> Any:
        """The normalised record that the registry keeps for this kind."""

    def check(self, bound: Bound, base: Base) -> None:
        """Raises Refused for what this server cannot serve, though it fits the base."""

    def check_together(self, adapters: Sequence[Bound], base: Base, settings: Settings) -> None:
        """All of this kind in one request. Raises InvalidRequest or Refused."""

    def idle(self, bound: Bound, steps: int) -> str | None:
        """Why this adapter would change nothing, or None."""

    def describe(self, bound: Bound) -> dict[str, Any]:
        """What the receipt says of it beside its version and weights. Plain JSON."""


def check_fields(spec: Adapter, method: Method) -> None:
    """A field that would be overlooked is refused by name. Raises InvalidRequest."""
    known = method.FIELDS | {"ref", "weight"}
    for name, info in Adapter.model_fields.items():
        if name not in known and getattr(spec, name) != info.default:
            raise InvalidRequest(
                f"{spec.ref} is a {method.KIND}, for which {name} means nothing; leave it out",
                field=f"adapters.{name}",
            )
