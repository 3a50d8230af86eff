"""The server's side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scumble_registry.formats.safetensors_header import Array
from scumble_server.methods.context import Context
from scumble_server.methods.method import Method, TextChange
from scumble_server.request.adapter import ResolvedAdapter
from support.steering.format import KIND, read_record


class SteeringMethod(Method):
    kind = KIND
    fields = frozenset({"start", "end"})

    def read_record(self, path: Path) -> Array:
        return read_record(path)

    def text_change(self, context: Context, weights: Mapping[ResolvedAdapter, float]) -> TextChange | None:
        acting = {adapter: weight for adapter, weight in weights.items() if weight}
        if not acting:
            return None
        total = sum(
            weight * torch.from_numpy(context.record(adapter, read_record).astype(np.float32))
            for adapter, weight in acting.items()
        )
        assert isinstance(total, Tensor)
        key = tuple((adapter.version.digest, weight) for adapter, weight in acting.items())
        return TextChange(key, lambda keys, values: (keys + total.to(keys), values + total.to(values)))
