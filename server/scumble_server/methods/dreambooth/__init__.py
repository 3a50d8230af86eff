"""DreamBooth: a checkpoint is another set of weights that the whole request is drawn with.

Its executor shares every tensor that the checkpoint does not change with the base's. Rows of one checkpoint share their
steps; other adapters stack on it as on the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import CLIPTokenizer

from scumble.errors import Incompatible, InvalidRequest
from scumble_build.graphs.arrays import as_tensor
from scumble_build.graphs.loading import loading
from scumble_registry import Registry, Version
from scumble_registry.compatibility import DreamboothCompatibility
from scumble_registry.formats.dreambooth import KIND, read_changed
from scumble_server.base import Base, load_tokenizers
from scumble_server.executors.protocol import Executor
from scumble_server.memory.residency import Lease
from scumble_server.methods.context import Context, Weights
from scumble_server.methods.method import Method
from scumble_server.request.adapter import ResolvedAdapter
from scumble_server.request.settings import Settings


class DreamboothMethod(Method):
    kind = KIND

    def check(self, adapter: ResolvedAdapter, base: Base) -> None:
        """It is a difference to one base, and it acts or not. Raises Incompatible, InvalidRequest."""
        version, spec = adapter.version, adapter.spec
        if version.manifest.base != base.version.digest:
            raise Incompatible(
                f"{version.ref} is a checkpoint of another version of the base ({version.manifest.base}); "
                f"publish it again with --base {base.version.ref}",
                ref=spec.ref,
            )
        if spec.weight not in {0, 1}:
            raise InvalidRequest(
                f"{spec.ref} is a checkpoint, whose weight is 1 or 0, not {spec.weight:g}; for shades of it "
                f"make a LoRA: scumble registry extract {version.ref} --rank 64 --name ns/name",
                field="adapters.weight",
            )

    def check_together(self, adapters: Sequence[ResolvedAdapter], base: Base, settings: Settings) -> None:  # noqa: ARG002
        if len(adapters) > 1:
            raise InvalidRequest(
                f"{' and '.join(adapter.spec.ref for adapter in adapters)} are checkpoints; a request is drawn with "
                "one",
                field="adapters",
            )

    def idle(self, adapter: ResolvedAdapter, steps: int) -> str | None:  # noqa: ARG002 - it acts in every step
        return None if adapter.spec.weight else "weight 0"

    def scheduler_config(self, adapter: ResolvedAdapter) -> Mapping[str, Any] | None:
        return _compatibility(adapter).scheduler

    def weights(self, adapter: ResolvedAdapter, own: Weights, base: Base, registry: Registry, loaded: Lease) -> Weights:
        """Load the checkpoint beside its base, unless it is resident."""
        version, checkpoint = adapter.version, _checkpoint(adapter, own, base, registry, loaded)
        return Weights(
            version,
            _key(adapter, base),
            checkpoint.executor,
            checkpoint.tokenizers,
            checkpoint.executor.vae,
            version.digest,
        )

    def layers(self, context: Context, adapter: ResolvedAdapter) -> int:
        """The layers of UNet and text encoders, norms included, of which the loaded checkpoint has other weights."""
        return _checkpoint(adapter, context.base_weights, context.base, context.registry, context.loaded).layers

    def describe(self, adapter: ResolvedAdapter) -> dict[str, Any]:
        return {"changed": _compatibility(adapter).changed}


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    executor: Executor
    tokenizers: tuple[CLIPTokenizer, ...]
    layers: int
    """How many layers of UNet and text encoders were replaced."""


def _key(adapter: ResolvedAdapter, base: Base) -> tuple[str, str, str]:
    return "checkpoint", base.version.digest, adapter.version.digest


def _checkpoint(adapter: ResolvedAdapter, own: Weights, base: Base, registry: Registry, loaded: Lease) -> _Checkpoint:
    nbytes = sum(_compatibility(adapter).changed.values()) * own.executor.dtype.itemsize
    return loaded.get(
        _key(adapter, base),
        nbytes,
        lambda: _load(adapter.version, own, base, registry),
        of=own.key,
        drop=lambda checkpoint: checkpoint.executor.close(),
    )


def _load(version: Version, own: Weights, base: Base, registry: Registry) -> _Checkpoint:
    stored, of_base = registry.stored(version), registry.stored(base.version)
    with loading(version.ref, version.digest):
        changed = {
            component: {name: as_tensor(values) for name, values in tensors.items()}
            for component, tensors in read_changed(stored, of_base).items()
        }
        return _Checkpoint(
            own.executor.variant(changed, stored, version), load_tokenizers(stored, base.family), _count_layers(changed)
        )


def _count_layers(changed: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Count the layers of tensors by component; a layer's weight and bias are one."""
    return sum(
        len({name.rpartition(".")[0] for name in tensors})
        for component, tensors in changed.items()
        if component == "unet" or component.startswith("text_encoder")
    )


def _compatibility(adapter: ResolvedAdapter) -> DreamboothCompatibility:
    compatibility = adapter.version.manifest.compatibility
    assert isinstance(compatibility, DreamboothCompatibility)
    return compatibility
