"""Settings of a hypernetwork run, in addition to those of every run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import model_validator

from scumble.errors import InvalidRequest
from scumble_trainers.data.dataset import Example
from scumble_trainers.settings import MODEL, TRAIN, TrainSettings, option

REFINE = "Refinement"


class HypernetworkSettings(TrainSettings):
    """The network and the LoRA that it predicts; or an existing network and a picture to refine its prediction for."""

    width: int = option(128, panel=MODEL, help="Width of the network's hidden states.", ge=8, le=4096)
    depth: int = option(3, panel=MODEL, help="Decoder layers.", ge=1, le=32)
    heads: int = option(4, panel=MODEL, help="Attention heads; must divide the width.", ge=1, le=64)
    passes: int = option(1, panel=MODEL, help="Passes of the decoder, each fed the last one's prediction.", ge=1, le=8)
    rank: int = option(
        1, panel=MODEL, help="Rank of the predicted LoRA; with --refine, of the refined one if larger.", ge=1, le=64
    )
    a: int = option(32, panel=MODEL, help="Predicted coefficients per rank on a layer's output side.", ge=1, le=1024)
    b: int = option(32, panel=MODEL, help="The same on its input side.", ge=1, le=1024)
    alpha: float | None = option(
        None, panel=MODEL, help="The update is multiplied by alpha / rank; default: the rank.", gt=0
    )
    same_reference: float = option(
        0.5,
        panel=TRAIN,
        help="Share of rows whose reference is the picture itself, not another of its concept.",
        ge=0,
        le=1,
    )

    refine: int | None = option(
        None,
        panel=REFINE,
        help="Train no network, but for this many steps the LoRA that --from predicts for --reference.",
        ge=1,
        le=1_000_000,
    )
    source: str | None = option(
        None, panel=REFINE, name="from", help="The hypernetwork: a file, or a reference: ns/name@7."
    )
    reference: Path | None = option(None, panel=REFINE, help="The reference picture; default: the first of the data.")

    @model_validator(mode="before")
    @classmethod
    def _steps_are_those_of_the_refinement(cls, values: dict[str, Any]) -> dict[str, Any]:
        refine = values.get("refine")
        return values if refine is None or "steps" in values else {**values, "steps": refine}

    @property
    def scale_alpha(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha

    def check_examples(self, examples: Sequence[Example]) -> None:
        super().check_examples(examples)
        if self.refine is not None:
            return
        if self.width % self.heads:
            raise InvalidRequest(f"--width {self.width} is not divisible by --heads {self.heads}", field="heads")
        if self.source is not None or self.reference is not None:
            raise InvalidRequest("--from and --reference need --refine N", field="refine")
        if len({concept_of(example) for example in examples}) < 2:
            raise InvalidRequest(
                "all pictures show one concept, but a hypernetwork needs many concepts: give "
                'each line its "concept", or train a LoRA',
                field="data",
            )

    def warnings(self, examples: Sequence[Example]) -> list[str]:
        return [] if self.refine is not None else super().warnings(examples)  # one picture is what --refine is for


def concept_of(example: Example) -> str:
    """Return an example's concept; one without is a concept of its own."""
    return example.name if example.concept is None else example.concept
