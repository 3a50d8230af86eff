"""What a hypernetwork's run can be told beside what every run can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import model_validator

from scumble_trainers.settings import MODEL, TRAIN, TrainSettings, option

REFINE = "Refinement"


class HypernetworkSettings(TrainSettings):
    """The network and what it predicts; or a network that is there, and a picture to refine its prediction for."""

    width: int = option(128, panel=MODEL, help="Of the network's own states.", ge=8, le=4096)
    depth: int = option(3, panel=MODEL, help="Layers of its decoder.", ge=1, le=32)
    heads: int = option(4, panel=MODEL, help="Of its attentions; divides the width.", ge=1, le=64)
    passes: int = option(1, panel=MODEL, help="How often it looks, its last prediction fed back.", ge=1, le=8)
    rank: int = option(
        1, panel=MODEL, help="Of the predicted LoRA; with --refine, of the refined one if that is more.", ge=1, le=64
    )
    a: int = option(32, panel=MODEL, help="Numbers that a layer's output is predicted in, per rank.", ge=1, le=1024)
    b: int = option(32, panel=MODEL, help="The same of its input.", ge=1, le=1024)
    alpha: float | None = option(
        None, panel=MODEL, help="The update is multiplied by alpha / rank; by default alpha = rank.", gt=0
    )
    same_reference: float = option(
        0.5,
        panel=TRAIN,
        help="Share of rows that are shown the picture itself, the others another one of its concept.",
        ge=0,
        le=1,
    )

    refine: int | None = option(
        None,
        panel=REFINE,
        help="Train no network: these many updates (--steps) of the one LoRA that --from predicts for --reference.",
        ge=1,
        le=1_000_000,
    )
    source: str | None = option(
        None, panel=REFINE, name="from", help="The hypernetwork: a file, or a reference: ns/name@7."
    )
    reference: Path | None = option(None, panel=REFINE, help="The picture; by default the data's first.")

    @model_validator(mode="before")
    @classmethod
    def _steps_are_those_of_the_refinement(cls, values: dict[str, Any]) -> dict[str, Any]:
        refine = values.get("refine")
        return values if refine is None or "steps" in values else {**values, "steps": refine}

    @property
    def scale_alpha(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha
