"""The contract of an adapter method. Whoever handles a request loops over the methods and asks each the same questions.

A new method is a subclass of `Method`, which answers only the questions that concern it, and a line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from scumble.errors import InvalidRequest
from scumble.events import Pixels
from scumble.request import Adapter
from scumble_build.graphs.layout import Layout
from scumble_registry import Registry
from scumble_registry.compatibility import LoraCompatibility
from scumble_registry.formats.lora import Module
from scumble_server.base import Base
from scumble_server.memory.residency import Lease
from scumble_server.methods.context import Context, Text, Weights
from scumble_server.methods.part import Part
from scumble_server.prompts.tokens import PromptWord
from scumble_server.request.adapter import ResolvedAdapter
from scumble_server.request.settings import Settings


def _unconditional(_context: Context) -> Hashable:
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """The LoRA that an adapter is, brings along or predicts.

    `read` gives its record; `condition` names what the record depends on beside the adapter's version.
    """

    adapter: ResolvedAdapter
    compatibility: LoraCompatibility
    read: Callable[[Context], Mapping[str, Module]]
    condition: Callable[[Context], Hashable] = _unconditional

    def identity(self, context: Context) -> Hashable:
        """Name all that its factors are made of, apart from its weight and the base's weights."""
        return self.adapter.version.digest, self.condition(context), self.adapter.blocks

    @property
    def targets(self) -> Iterable[str]:
        """The layers and norms that it changes, by canonical name."""
        return self.compatibility.requires

    @property
    def merged(self) -> frozenset[str]:
        """The targets that it changes in a way that no factors express."""
        return frozenset(self.compatibility.merged)

    @property
    def depends_on_weights(self) -> bool:
        """A DoRA is bound to the weights that its gains were measured against."""
        return self.compatibility.magnitudes

    def columns(self, layout: Layout, without: frozenset[str] = frozenset()) -> int:
        """How many rank columns it needs in this graph, for all targets but those `without`."""
        ranks = self.compatibility.ranks.items()
        return max((rank for name, rank in ranks if name in layout.targets and name not in without), default=0)


@dataclass(frozen=True, slots=True)
class TextChange:
    """What a method makes of the text on its way to cross-attention.

    `apply` takes what keys and what values are read from, `(rows, T, C)` each, and gives the same changed; `key` names
    all that it depends on.
    """

    key: Hashable
    apply: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Method:
    """One kind of adapter. The answers here are those of a method that a question does not concern."""

    kind: ClassVar[str]
    """The registry's word."""
    fields: ClassVar[frozenset[str]] = frozenset()
    """The fields of an adapter in a request that this method reads, beside `ref` and `weight`."""

    # Admission: what a request may ask. Nothing is loaded yet.

    def check(self, adapter: ResolvedAdapter, base: Base) -> None:
        """Raise InvalidRequest, Refused or Incompatible for what this server cannot serve, though it fits the base."""

    def check_together(self, adapters: Sequence[ResolvedAdapter], base: Base, settings: Settings) -> None:
        """Check all adapters of this kind in one request. Raises InvalidRequest or Refused."""

    def idle(self, adapter: ResolvedAdapter, steps: int) -> str | None:
        """Say why this adapter would change nothing, or None."""
        return adapter.why_never(steps)

    def scheduler_config(self, adapter: ResolvedAdapter) -> Mapping[str, Any] | None:  # noqa: ARG002
        """The scheduler's config where the adapter brings its own: it may predict something else than the base."""
        return None

    # Prompts.

    def word(self, adapter: ResolvedAdapter) -> PromptWord | None:  # noqa: ARG002
        """What stands for the adapter in a prompt."""
        return None

    def vectors(self, context: Context, adapter: ResolvedAdapter, component: str) -> Tensor:
        """What the word, if there is one, becomes in one of the base's text encoders: `(n, C)` float32, weighted."""
        raise NotImplementedError

    # What a request is drawn with, and what its rows carry. Called in the conditioning thread.

    def read_record(self, path: Path) -> Any:  # noqa: ARG002
        """Read the normalised record that the registry keeps for this kind; None where it keeps none."""
        return None

    def weights(
        self,
        adapter: ResolvedAdapter,  # noqa: ARG002
        own: Weights,  # noqa: ARG002
        base: Base,  # noqa: ARG002
        registry: Registry,  # noqa: ARG002
        loaded: Lease,  # noqa: ARG002
    ) -> Weights | None:
        """Other weights than the base's `own`, that the whole request is drawn with; `loaded` holds them.

        Raises NotFound, IntegrityError, Refused (the budget).
        """
        return None

    def lora(self, adapter: ResolvedAdapter) -> Lora | None:  # noqa: ARG002
        """The LoRA that the adapter becomes, or brings along."""
        return None

    def text_change(self, context: Context, weights: Mapping[ResolvedAdapter, float]) -> TextChange | None:  # noqa: ARG002
        """What the adapters of this kind, at their weights in one phase, make of the text for cross-attention."""
        return None

    def carry(self, context: Context, weights: Mapping[ResolvedAdapter, float], text: Text) -> Part | None:  # noqa: ARG002
        """What rows carry from the adapters of this kind, at their weights in one phase, in which `text` is read.

        None where none of them acts. What is costly is kept by `context.device`, so that all phases share it.
        """
        return None

    def control_maps(self, context: Context, adapter: ResolvedAdapter) -> Sequence[Pixels]:  # noqa: ARG002
        """The control maps that are made here of the adapter's pictures."""
        return ()

    # The receipt.

    def layers(self, context: Context, adapter: ResolvedAdapter) -> int | None:  # noqa: ARG002
        """How many of the base's layers the bound adapter acts on; None for what is no part of a layer. A LoRA's are
        counted where its factors are laid out.
        """
        return None

    def describe(self, adapter: ResolvedAdapter) -> dict[str, Any]:  # noqa: ARG002
        """What the receipt says of it beside its version and weights. Plain JSON."""
        return {}


def check_fields(spec: Adapter, method: Method) -> None:
    """Refuse by name a field that the method would overlook. Raises InvalidRequest."""
    known = method.fields | {"ref", "weight"}
    for name, info in Adapter.model_fields.items():
        if name not in known and getattr(spec, name) != info.default:
            raise InvalidRequest(
                f"{spec.ref} is a {method.kind}, for which {name} means nothing; leave it out",
                field=f"adapters.{name}",
            )
