from __future__ import annotations

import pytest
import torch

from scumble_demo.emoji.gallery import Gallery
from scumble_demo.pretraining.augment import augment
from scumble_demo.pretraining.clip import all_captions, tokenize
from scumble_demo.pretraining.tokenizer import train_tokenizer
from scumble_demo.pretraining.towers import contrastive_loss
from scumble_demo.pretraining.unseen import unseen_pairs


def test_prompts_read_back_as_they_were_written(gallery: Gallery) -> None:
    texts = [text for row in all_captions(gallery) for texts in row for text in texts]
    tokenizer = train_tokenizer(texts, vocabulary=1200)
    ids = tokenizer("A red apple, noto style").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == "a red apple, noto style"
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token_id not in tokenizer("ünknown 漢字 🍎", add_special_tokens=False).input_ids


def test_a_long_prompt_is_cut_and_ends_with_eos() -> None:
    tokenizer = train_tokenizer(["a red apple"] * 3, vocabulary=600)
    ids = tokenize(tokenizer, ["a red apple " * 60], 77)
    assert ids.shape == (1, 77)
    assert int(ids[0, -1]) == tokenizer.eos_token_id


def test_the_contrastive_loss_is_clips_own_where_every_picture_has_one_caption() -> None:
    transformers = pytest.importorskip("transformers.models.clip.modeling_clip")
    generator = torch.Generator().manual_seed(0)
    pictures, texts = (torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1) for _ in "ab")
    scale = torch.tensor(2.0)
    theirs = transformers.image_text_contrastive_loss(scale.exp() * texts @ pictures.T)
    assert torch.allclose(contrastive_loss(pictures, texts, torch.eye(6).bool(), scale), theirs)


def test_unseen_pairs_leave_other_styles_of_each_concept() -> None:
    pairs = unseen_pairs()
    assert len(pairs) == len({pair.row for pair in pairs}) == 80
    assert pairs == unseen_pairs()
    assert {pair.style for pair in pairs} == {0, 1, 2, 3, 4}


def test_augmentation_keeps_the_paper_white_and_repeats_with_its_seed() -> None:
    white = torch.ones(10, 3, 32, 32)
    changed = augment(white.clone(), torch.Generator().manual_seed(1))
    assert changed.min() > 0.6
    assert torch.equal(changed, augment(white.clone(), torch.Generator().manual_seed(1)))
