from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from scumble_demo.emoji.concepts import STYLES, base_concepts, concepts
from scumble_demo.emoji.gallery import Gallery
from scumble_demo.pretraining.evaluate import NEEDED, Evaluation, evaluation_prompts, judge
from scumble_demo.pretraining.unseen import unseen_pairs
from scumble_demo.scorer import Scores, hit_rate


def test_hit_rate_counts_the_k_best() -> None:
    scores = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3]])
    assert hit_rate(scores, [0, 0], 1) == 0.5
    assert hit_rate(scores, [1, 1], 2) == 0.5
    assert hit_rate(scores, [1, 0], 4) == 1.0


def test_the_prompts_are_200_different_known_pictures_and_always_the_same() -> None:
    prompts = evaluation_prompts()
    assert len({(prompt.concept, prompt.style) for prompt in prompts}) == len(prompts) == 200
    assert {prompt.concept for prompt in prompts} <= set(base_concepts())
    assert prompts == evaluation_prompts()


class Oracle:
    """Answers with what it is told, wrong for every second picture."""

    def __init__(self, answers: list[list[tuple[int, int]]]) -> None:
        self.answers = answers

    def score(self, pictures: np.ndarray) -> Scores:  # type: ignore[type-arg]
        told = self.answers.pop(0)
        assert len(told) == len(pictures)
        concept, style = torch.zeros(len(told), len(concepts())), torch.zeros(len(told), len(STYLES))
        for number, (row, column) in enumerate(told):
            concept[number, row if number % 2 == 0 else (row + 1) % len(concepts())] = 1
            style[number, column] = 1
        return Scores(concept, style)


def test_the_judgement_compares_with_what_was_asked_for(gallery: Gallery) -> None:
    prompts = evaluation_prompts(10)
    asked = [(concepts().index(prompt.concept), STYLES.index(prompt.style)) for prompt in prompts]
    real = [(pair.row, pair.style) for pair in unseen_pairs()]
    pictures = np.zeros((10, 32, 32, 3), np.uint8)
    evaluation = judge(Oracle([asked, real]), pictures, prompts, gallery)  # type: ignore[arg-type]
    assert evaluation.concept_top1 == pytest.approx(0.5)
    assert evaluation.style_top1 == 1.0
    assert evaluation.real_concept_top1 == pytest.approx(0.5)
    assert evaluation.real_style_top1 == 1.0


def test_passing_needs_every_number() -> None:
    good = dict.fromkeys(asdict(Evaluation(0, 0, 0, 0, 0, 0, 0, 0)), 1.0)
    assert Evaluation(**good).passed  # type: ignore[arg-type]
    for name in NEEDED:
        assert not Evaluation(**{**good, name: NEEDED[name] - 0.01}).passed  # type: ignore[arg-type]
