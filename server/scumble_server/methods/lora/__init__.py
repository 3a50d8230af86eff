"""LoRA and its whole family. What becomes of a LoRA, whichever method brings it, is in `factors/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scumble.errors import Refused
from scumble_registry.compatibility import LoraCompatibility
from scumble_registry.formats.lora import KIND, LoraRecord, read_record
from scumble_server.base import Base
from scumble_server.methods.method import Lora, Method
from scumble_server.request.adapter import ResolvedAdapter


class LoraMethod(Method):
    kind = KIND
    fields = frozenset({"text_weight", "blocks", "start", "end"})

    def read_record(self, path: Path) -> LoraRecord:
        return read_record(path)

    def check(self, adapter: ResolvedAdapter, base: Base) -> None:
        check_targets(self.lora(adapter), base)

    def idle(self, adapter: ResolvedAdapter, steps: int) -> str | None:
        return why_idle(self.lora(adapter), steps)

    def lora(self, adapter: ResolvedAdapter) -> Lora:
        compatibility = adapter.version.manifest.compatibility
        assert isinstance(compatibility, LoraCompatibility)
        return Lora(adapter, compatibility, lambda context: context.record(adapter, read_record))

    def describe(self, adapter: ResolvedAdapter) -> dict[str, Any]:
        return describe_lora(self.lora(adapter))


def check_targets(lora: Lora, base: Base) -> None:
    """Every target that rows carry factors for must be in one of the graphs. Raises Refused."""
    for target in lora.compatibility.ranks:
        if not any(target in layout.targets for layout in base.layouts):
            raise Refused(
                f"{lora.adapter.version.ref} changes {target}, which this server cannot adapt",
                ref=lora.adapter.spec.ref,
                target=target,
            )


def why_idle(lora: Lora, steps: int) -> str | None:
    """Say why a LoRA would change nothing, or None. In the text encoders its weight follows no schedule."""
    if lora.compatibility.idle:
        return "every change in it is zero"
    blocks = lora.adapter.blocks
    if blocks is not None and not any(map(blocks.of, lora.targets)):
        return "the weights of all blocks that it changes are 0"
    has_text = any(name.startswith("text_encoder") for name in lora.targets)
    return None if lora.adapter.text_weight and has_text else lora.adapter.why_never(steps)


def describe_lora(lora: Lora) -> dict[str, Any]:
    """What the receipt says of a LoRA: its largest rank, and how many targets are merged into weights."""
    merged = lora.compatibility.merged
    rank = max(lora.compatibility.ranks.values(), default=0)
    return {"rank": rank, **({"merged": len(merged)} if merged else {})}
