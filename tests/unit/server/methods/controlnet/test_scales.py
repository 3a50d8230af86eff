"""How strongly residuals act: ControlNet's own guess mode is the oracle of the soft weights."""

from __future__ import annotations

import pytest
import torch

from scumble_server.methods.controlnet.scales import of_features, of_lite, of_residuals

GUESS = [0.825 ** float(12 - i) for i in range(13)]
"""ControlNet's own gradio apps: `[strength * (0.825 ** float(12 - i)) for i in range(13)]`."""


def test_balanced_acts_alike_everywhere() -> None:
    assert torch.equal(of_residuals("balanced", 0.7, 13, 2, pools=False), torch.full((2, 13), 0.7))


def test_prompt_and_control_have_the_weights_of_controlnets_guess_mode() -> None:
    expected = 0.5 * torch.tensor(GUESS)
    prompt, control = (of_residuals(mode, 0.5, 13, 2, pools=False) for mode in ("prompt", "control"))
    torch.testing.assert_close(prompt, expected.expand(2, -1))
    torch.testing.assert_close(control[1], expected)
    assert not control[0].any()


def test_guess_is_diffusers() -> None:
    guess = of_residuals("guess", 1.0, 13, 2, pools=False)
    torch.testing.assert_close(guess[1], torch.logspace(-1, 0, 13))
    assert not guess[0].any()


@pytest.mark.parametrize("mode", ["balanced", "prompt", "control", "guess"])
def test_a_pooling_net_never_acts_on_the_negative_prompt(mode: str) -> None:
    scales = of_residuals(mode, 1.0, 13, 2, pools=True)
    assert not scales[0].any()
    assert scales[1].all()


@pytest.mark.parametrize("mode", ["balanced", "prompt", "control", "guess"])
def test_without_guidance_there_is_the_prompts_row_alone(mode: str) -> None:
    alone = of_residuals(mode, 1.0, 13, 1, pools=False)
    assert torch.equal(alone, of_residuals(mode, 1.0, 13, 2, pools=False)[1:])


def test_features_and_lites_leave_the_negative_prompt_alone_in_control_mode() -> None:
    assert of_features("balanced", 0.5, 4, 2).tolist() == [[0.5] * 4]
    negative, prompt = of_features("control", 1.0, 4, 2)
    assert not negative.any()
    torch.testing.assert_close(prompt, torch.tensor([0.25, 0.62, 0.825, 1.0]))
    assert of_lite("control", 0.5, 2).tolist() == [0.0, 0.5]
    assert of_lite("balanced", 0.5, 2).tolist() == [0.5, 0.5]
    assert of_lite("control", 0.5, 1).tolist() == [0.5]
