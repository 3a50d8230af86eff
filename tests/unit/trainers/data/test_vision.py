"""What the tower makes of pictures: the same whether it is kept or made anew; transformers is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from scumble_trainers.base import TrainingBase
from scumble_trainers.data import vision
from scumble_trainers.data.dataset import read_examples
from scumble_trainers.data.vision import PictureStates
from scumble_trainers.progress import silent


@pytest.mark.parametrize("reads", ["embedding", "states"])
@pytest.mark.parametrize("limit", [vision.CACHE_LIMIT, 0], ids=["kept", "anew"])
def test_it_is_what_transformers_makes(
    base: TrainingBase, things: Path, monkeypatch: pytest.MonkeyPatch, reads: Any, limit: int
) -> None:
    monkeypatch.setattr(vision, "CACHE_LIMIT", limit)
    examples = read_examples(things, resolution=16)
    seen = PictureStates(base, None, reads, torch.device("cpu"))
    seen.read(examples, silent)
    folder = base.folder / "image_encoder"
    tower: Any = CLIPVisionModelWithProjection.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(
        [np.asarray(Image.open(examples[index].path)) for index in (4, 1)], return_tensors="pt"
    ).pixel_values
    with torch.no_grad():
        output = tower(pixels, output_hidden_states=True)
    expected = output.image_embeds if reads == "embedding" else output.hidden_states[-2]
    torch.testing.assert_close(seen.of(torch.tensor([4, 1])), expected, atol=1e-5, rtol=1e-4)
    assert (seen._kept is None) == (limit == 0)


def test_no_picture_is_zeros_for_an_embedding_and_a_blank_one_for_states(base: TrainingBase) -> None:
    embedding, states = (PictureStates(base, None, reads, torch.device("cpu")) for reads in ("embedding", "states"))
    assert embedding.nothing().abs().max() == 0
    assert states.nothing().abs().max() > 0
