"""What a LoRA's parsers do not understand: see `formats/leftover.py`."""

from __future__ import annotations

from scumble_registry.formats.leftover import refuse_leftover

__all__ = ["refuse_leftover"]
