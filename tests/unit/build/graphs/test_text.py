"""Token overrides against transformers' own text encoder with the vectors written into its table."""

from __future__ import annotations

import copy

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from scumble_build.graphs.text import Overrides, TextEncoder, TextInputs


def model() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=38,
        eos_token_id=39,
        pad_token_id=39,
    )
    return CLIPTextModel(config).eval()


@torch.inference_mode()
def test_overrides_equal_rows_of_the_table() -> None:
    grown = model()
    encoder = TextEncoder(copy.deepcopy(grown))
    vectors = torch.randn(3, 16)
    grown.get_input_embeddings().weight[:3] = vectors
    asked = torch.tensor([[38, 5, 0, 1, 7, 39], [38, 9, 9, 2, 39, 39]])
    filled = torch.where(asked < 3, 38, asked)
    expected = grown(asked).last_hidden_state

    table = encoder.model.state_dict()["embeddings.token_embedding.base.weight"].clone()
    overrides = Overrides(vectors, torch.tensor([0, 0, 1]), torch.tensor([2, 3, 3]))
    torch.testing.assert_close(encoder(TextInputs(filled, overrides=overrides)).states, expected)
    plain = encoder(TextInputs(filled)).states
    assert not torch.allclose(plain[0, 2:], expected[0, 2:])
    torch.testing.assert_close(plain[:, :2], expected[:, :2], msg="what stands before does not see it")
    assert torch.equal(encoder.model.state_dict()["embeddings.token_embedding.base.weight"], table)
