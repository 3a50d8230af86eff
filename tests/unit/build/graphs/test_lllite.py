"""An LLLite's networks: torch's own layers are the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scumble.errors import Refused
from scumble_build.graphs.lllite import LLLite, load_lllite
from scumble_registry.formats.controlnet import FILE_NAME

TARGET = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WIDTH, HIDDEN, EMBEDDED = 8, 5, 6


class Theirs(nn.Module):
    """As in kohya's sd-scripts (`control_net_lllite.py`), of the shallowest depth."""

    def __init__(self) -> None:
        super().__init__()
        self.conditioning1 = nn.Sequential(
            nn.Conv2d(3, EMBEDDED // 2, 4, stride=4), nn.ReLU(), nn.Conv2d(EMBEDDED // 2, EMBEDDED, 2, stride=2)
        )
        self.down = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(HIDDEN + EMBEDDED, HIDDEN), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor, control: Tensor) -> Tensor:
        embedded = self.conditioning1(control * 2 - 1).flatten(2).transpose(1, 2)
        added: Tensor = self.up(self.mid(torch.cat([embedded, self.down(x)], dim=2)))
        return added


@pytest.fixture(scope="module")
def theirs() -> Theirs:
    torch.manual_seed(0)
    return Theirs().eval().requires_grad_(requires_grad=False)


def test_it_changes_what_kohyas_module_changes(theirs: Theirs) -> None:
    net = LLLite({TARGET: theirs.state_dict()})
    control, x = torch.rand(1, 3, 16, 24), torch.randn(1, 6, WIDTH)
    embeddings = net.embed(control)
    torch.testing.assert_close(net.change(TARGET, x, embeddings[TARGET]), theirs(x, control))
    assert net.embedded_values(16, 24) == embeddings[TARGET].numel()
    assert net.targets == {TARGET}


def test_a_published_file_names_modules_of_the_base(theirs: Theirs, tmp_path: Path) -> None:
    module = "lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{module}.{name}": values.clone() for name, values in theirs.state_dict().items()}
    save_file(tensors, tmp_path / FILE_NAME)
    with pytest.raises(Refused, match="which the base does not have"):
        load_lllite(tmp_path, ["unet.conv_in"])
