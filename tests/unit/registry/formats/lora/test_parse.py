"""Whatever shapes a stranger's file has: it becomes a sound record, or is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble.errors import Incompatible, Refused
from scumble_registry.compatibility import BaseCompatibility, norm_shapes
from scumble_registry.formats import lora
from scumble_registry.formats.lora.names import PARTS
from scumble_registry.formats.lora.parse import parse
from scumble_registry.formats.lora.peft import Scaling
from scumble_registry.formats.lora.record import write_record

TARGETS = {
    "unet.conv_in": (4, 4, 3, 3),
    "unet.mid_block.attentions.0.proj_in": (4, 4, 1, 1),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (4, 6),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (8, 4),
}
BASE = BaseCompatibility(
    family="sd1",
    prediction_type="epsilon",
    in_channels=4,
    latent_channels=4,
    sample_size=8,
    vae_scale=8,
    cross_attention_dim=8,
    text_widths=(8,),
    targets=TARGETS,
)
ALGORITHMS = (
    ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale", "alpha", "lora_B.bias", "scale"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "alpha", "dora_scale"),
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha"),
    ("oft_blocks", "oft_diag", "rescale", "alpha"),
    ("oft_R.weight", "boft_R", "boft_s", "ia3_l"),
    ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "alpha"),
    ("weight", "on_input", "diff", "diff_b", "dora_scale", "w_norm", "b_norm"),
    tuple(PARTS),
)
SHAPES = st.lists(st.sampled_from([0, 1, 1, 2, 2, 3, 4, 4, 6, 8]), max_size=4)


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    tensors = {}
    for target in draw(st.lists(st.sampled_from(sorted(TARGETS)), min_size=1, max_size=2, unique=True)):
        for part in draw(st.lists(st.sampled_from(draw(st.sampled_from(ALGORITHMS))), min_size=1, unique=True)):
            shape = draw(SHAPES)
            tensors[f"{target}.{part}"] = np.random.default_rng(len(tensors)).normal(size=shape).astype(np.float32)
    return tensors


def computed(module: Any, target: str) -> None:
    """The server can make of it what becomes of a weight."""
    torch = pytest.importorskip("torch")
    from scumble_server.factors.deltas import bias_change, change

    shape = {**norm_shapes(BASE), **TARGETS}[target]
    assert change(torch.ones(shape), module).shape == shape
    of_bias = bias_change(torch.ones(shape[0]), module)
    assert of_bias is None or of_bias.shape == shape[:1]


@settings(max_examples=300)
@given(tensors=files(), known=st.booleans(), terms=st.sampled_from([0, 3]))
def test_any_shapes_are_computed_or_refused(tensors: dict[str, Any], known: bool, terms: int) -> None:
    scaling = Scaling(alpha=2.0, neumann_terms=terms, feedforward=("fc1",))
    with contextlib.suppress(Refused, Incompatible):
        parsed = parse(tensors, {"unet": scaling, "text_encoder": scaling}, BASE if known else None)
        assert write_record(parsed.record)
        compatibility = lora._derive(parsed.record, BASE, None)
        compatibility.fits(BASE)
        for target, module in parsed.record.items():
            computed(module, target)
