"""Measures whether images follow the given edges, with a prompt and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from scumble.request import Adapter
from scumble_build.control_maps import Canny
from scumble_demo.evaluation.ip_adapter import png
from scumble_demo.evaluation.measures import edge_f1
from scumble_demo.evaluation.trial import ADAPTER, COUNT, Metrics, Trial, known_prompts, rounded, show, some_concepts
from scumble_demo.evaluation.unseen import unseen_pictures
from scumble_demo.scorer import Scorer
from scumble_registry.results import Result
from scumble_trainers.base import TrainingBase
from scumble_trainers.results.serving import Served, served


def evaluate(base: TrainingBase, data: Path, out: Path, result: Result, scorer: Scorer) -> Metrics:  # noqa: ARG001
    """Measure with edges of held-out pictures, and prompts that name something else, or nothing."""
    maps = [Canny().apply(np.array(picture)) for picture in unseen_pictures(COUNT)]
    prompted = Trial(base, known_prompts(some_concepts()))
    silent = Trial(base, ("",) * COUNT)
    with served(base, {ADAPTER: out}) as server:
        without, adapted = prompted.plain(server), _draw(prompted, server, maps)
        silently, silently_without = _draw(silent, server, maps), silent.plain(server)
    pictures = [Image.fromarray(edges) for edges in maps]
    show(out, {"edges": pictures, "without": without, "with": adapted, "no prompt": silently}, prompted.prompts)
    return rounded(
        {
            "pictures": COUNT,
            "edge_f1_without": edge_f1(without, maps),
            "edge_f1": edge_f1(adapted, maps),
            "edge_f1_no_prompt_without": edge_f1(silently_without, maps),
            "edge_f1_no_prompt": edge_f1(silently, maps),
        }
    )


def _draw(trial: Trial, server: Served, maps: list[np.ndarray]) -> list[Image.Image]:  # type: ignore[type-arg]
    images = {str(index): png(Image.fromarray(edges)) for index, edges in enumerate(maps)}
    return trial.draw(server, [Adapter(ref=ADAPTER, images=(name,)) for name in images], images=images)
