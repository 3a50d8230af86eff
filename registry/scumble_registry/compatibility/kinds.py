"""Every kind's compatibility, told apart by its `kind` wherever one is read from JSON."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from scumble_registry.compatibility.base import Compatibility


def kinds() -> dict[str, type[Compatibility]]:
    """The classes by their kind: a new kind is one more subclass of `Compatibility`, in its format's module."""
    return {cls.model_fields["kind"].default: cls for cls in Compatibility.__subclasses__()}


def _of_its_kind(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    cls = kinds().get(value.get("kind", ""))
    if cls is None:
        raise ValueError(f"kind is {value.get('kind')!r}; known are {', '.join(sorted(kinds()))}")
    return cls.model_validate(value)


StoredCompatibility = Annotated[SerializeAsAny[Compatibility], BeforeValidator(_of_its_kind)]
"""As a field of a model: read as the class of its kind, written with all the fields of that class."""
