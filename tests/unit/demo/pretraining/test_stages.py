from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from scumble.errors import NotFound
from scumble_demo.emoji.gallery import Gallery
from scumble_demo.pretraining.export import export_base, load_parts
from scumble_demo.pretraining.stages import (
    Workshop,
    train_clip,
    train_scorer,
    train_unet,
    train_vae,
    trained_parts,
    vae_pictures,
)
from scumble_demo.scorer import Scorer


def test_a_stage_without_its_predecessor_says_which_to_run(shop: Workshop) -> None:
    with pytest.raises(NotFound, match="stage 'vae'"):
        train_unet(shop)


def test_the_vae_never_learns_held_out_concepts_or_styles(gallery: Gallery) -> None:
    learnt, shown = vae_pictures(gallery, concept_share=1)
    assert len(learnt) == (120 + 6) * 3
    assert len(shown) == 5 * 3 + 5 * 2


def test_all_stages_make_a_folder_that_diffusers_loads_and_that_training_goes_on_from(
    shop: Workshop, gallery: Gallery, tmp_path: Path
) -> None:
    for train in (train_vae, train_clip, train_unet, train_scorer):
        assert all(np.isfinite(value) for value in train(shop).values())
    out = tmp_path / "out"
    export_base(out, trained_parts(shop))

    pipe = StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float32
    assert pipe.tokenizer.pad_token_id == pipe.text_encoder.config.eos_token_id == len(pipe.tokenizer) - 1
    assert pipe.vae.config.scaling_factor != 0.18215
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red apple, noto style", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (32, 32, 3)

    scores = Scorer.load(out).score(gallery.pictures[:4, 0])
    assert scores.concept.shape == (4, 134)
    assert scores.style.shape == (4, 5)

    again = replace(shop, folder=tmp_path / "again", start=out)
    (tmp_path / "gallery").rename(tmp_path / "again-gallery")
    again.folder.mkdir()
    (tmp_path / "again-gallery").rename(again.folder / "gallery")
    train_unet(again)
    resumed = trained_parts(again)
    before = load_parts(out)
    assert not torch.equal(resumed.unet.conv_in.weight, before.unet.conv_in.weight)
    assert torch.allclose(resumed.unet.conv_in.weight, before.unet.conv_in.weight, atol=0.01)
    assert torch.equal(resumed.vae.decoder.conv_in.weight, before.vae.decoder.conv_in.weight)
