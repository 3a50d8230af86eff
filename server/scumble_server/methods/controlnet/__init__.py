"""ControlNet, union nets, control-LoRA, LLLite and T2I-Adapter: pictures that steer the UNet.

`checks.py` is what a request may ask for, `nets.py` loads nets and embeds pictures, `scales.py` says how strongly each
residual acts, `part.py` is what rows carry, `residuals.py` runs the nets of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scumble.events import Pixels
from scumble_registry.formats.controlnet import KIND
from scumble_server.base import Base
from scumble_server.methods.context import Context, Text
from scumble_server.methods.controlnet import checks
from scumble_server.methods.controlnet.nets import control_maps, control_of
from scumble_server.methods.controlnet.part import ControlPart
from scumble_server.methods.method import Method
from scumble_server.request.adapter import ResolvedAdapter
from scumble_server.request.settings import Settings


class ControlNetMethod(Method):
    kind = KIND
    fields = frozenset({"start", "end", "images", "scale", "mode", "control_type", "preprocess"})

    def check(self, adapter: ResolvedAdapter, base: Base) -> None:
        checks.check(adapter, base)

    def check_together(self, adapters: Sequence[ResolvedAdapter], base: Base, settings: Settings) -> None:
        for adapter in adapters:
            checks.check_size(adapter, base, settings)

    def idle(self, adapter: ResolvedAdapter, steps: int) -> str | None:
        scaled = any(checks.picture_scales(adapter))
        return adapter.why_never(steps) or (None if scaled else "scale 0 for every picture")

    def carry(self, context: Context, weights: Mapping[ResolvedAdapter, float], text: Text) -> ControlPart | None:
        return ControlPart.of(context, weights, text)

    def control_maps(self, context: Context, adapter: ResolvedAdapter) -> Sequence[Pixels]:
        return control_maps(context, adapter) if adapter.spec.preprocess is not None else ()

    def layers(self, context: Context, adapter: ResolvedAdapter) -> int:
        """The places at which something is added: residuals, features, or the matrices that an LLLite changes."""
        control = control_of(context, adapter)
        return len(control.features) or len(control.embeddings) or len(checks.compatibility(adapter).widths)

    def describe(self, adapter: ResolvedAdapter) -> dict[str, Any]:
        """Everything that was settled, defaults too."""
        spec, made_by = adapter.spec, checks.preprocessor(adapter)
        return {
            "form": checks.compatibility(adapter).form,
            "images": list(spec.images),
            "mode": checks.mode(adapter),
            "start": spec.start,
            "end": spec.end,
            **({"control_type": list(spec.control_type)} if spec.control_type else {}),
            **({"preprocess": made_by.model_dump()} if made_by is not None else {}),
        }
