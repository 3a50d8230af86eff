"""Unknown keys are refused by name: a key that is dropped without a word gives a wrong image."""

from __future__ import annotations

from collections.abc import Collection

from scumble.errors import Refused
from scumble_registry.formats.source import Source

_SHOWN = 8


def refuse_unknown_keys(keys: Collection[str], hint: str, of: str | None = None) -> None:
    """Raises Refused if there are unknown keys; `of` names their algorithm (`VeRA`), where it is known."""
    if not keys:
        return
    names = sorted(keys)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    kind = f"They are {of}" if of else f"They are of a kind that cannot be served yet, {hint}"
    raise Refused(
        f"{len(names)} keys are not understood: {', '.join(names[:_SHOWN])}{more}. {kind}; nothing was published",
        keys=names,
    )


def leave_out(source: Source, keys: Collection[str], hint: str) -> tuple[str, ...]:
    """Return the keys, sorted, if the publisher allows them to be left out. Raises Refused if not."""
    if not source.allow_leftover:
        refuse_unknown_keys(keys, hint)
    return tuple(sorted(keys))
