"""The webui's hypernetworks: each activation, norm, dropout and structure against the webui's own formula."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from scumble_build.graphs.hypernetwork import ACTIVATIONS, Hypernetwork, parameters_of
from scumble_registry.formats.hypernetwork import context
from scumble_registry.formats.hypernetwork.context_record import ACTIVATIONS as WORDS
from scumble_registry.formats.safetensors_header import read_header, read_tensors
from support.tiny_hypernetwork import WebuiHypernetwork


def published(theirs: WebuiHypernetwork, folder: Path) -> Hypernetwork:
    """Through the file and the record, as the server has it."""
    file = theirs.save(folder / "a.safetensors")
    header = read_header(file)
    record, _, _ = context.parse(read_tensors(file, header), header.metadata)
    (folder / "record.safetensors").write_bytes(record)
    header = read_header(folder / "record.safetensors")
    read = context.read(read_tensors(folder / "record.safetensors", header), header.metadata)
    ours = Hypernetwork(read)
    assert parameters_of(read) == sum(each.numel() for each in ours.parameters())
    return ours


def check(theirs: WebuiHypernetwork, folder: Path) -> None:
    ours = published(theirs, folder)
    for width in (*theirs.sides, 7):
        keys, values = torch.randn(2, 5, width), torch.randn(2, 5, width)
        for weight in (1.0, -0.6):
            for mine, want, was in zip(
                ours(keys, values, weight), theirs(keys, values, weight), (keys, values), strict=True
            ):
                assert (mine - want).abs().max() <= 1e-6
                assert torch.equal(want, was) == (width == 7)


def test_every_known_word_is_an_activation() -> None:
    assert set(ACTIVATIONS) == WORDS


@pytest.mark.parametrize("activation", sorted(WORDS))
def test_activations(activation: str, tmp_path: Path) -> None:
    check(WebuiHypernetwork([6, 8], seed=1, activation=activation), tmp_path)


@pytest.mark.parametrize("activate_output", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", ["linear", "tanh"])
@pytest.mark.parametrize("dropout", [(), (0, 0.3, 0, 0), (0, 0.3, 0.2, 0)])
def test_norms_dropouts_and_the_last_activation(
    activation: str, norm: bool, activate_output: bool, dropout: Sequence[float], tmp_path: Path
) -> None:
    structure = (1, 2, 1.5, 1)
    how = {"norm": norm, "activate_output": activate_output, "dropout": dropout, "structure": structure}
    check(WebuiHypernetwork([6, 8], seed=2, activation=activation, **how), tmp_path)


def test_a_chain_reads_what_the_one_before_made(tmp_path: Path) -> None:
    theirs = [WebuiHypernetwork([6], seed=seed) for seed in (1, 2)]
    ours = [published(each, tmp_path) for each in theirs]
    x = torch.randn(2, 5, 6)
    mine, want = (x, x), (x, x)
    for our, their, weight in zip(ours, theirs, (0.7, -0.4), strict=True):
        mine, want = our(*mine, weight), their(*want, weight)
    assert (mine[0] - want[0]).abs().max() <= 1e-6
    assert (mine[1] - want[1]).abs().max() <= 1e-6
    assert not torch.allclose(mine[0], mine[1])


def test_rows_have_strengths_of_their_own(tmp_path: Path) -> None:
    ours = published(WebuiHypernetwork([6], seed=3), tmp_path)
    x, weight = torch.randn(2, 5, 6), torch.tensor([0.5, -1.0])
    together = ours(x, x, weight[:, None, None])
    for row in range(2):
        alone = ours(x[row : row + 1], x[row : row + 1], float(weight[row]))
        assert all((one[row] - other[0]).abs().max() <= 1e-6 for one, other in zip(together, alone, strict=True))
