"""Before the UNet is asked, a picture's tokens are brought near what the text encoder makes of its captions.

Keys and values of pictures begin as the text's own, so from there on a picture of a thing calls up what the base knows
by the thing's name, and the denoising steps only add what words do not say. (ELITE, 2302.13848, begins with words too.)
No UNet runs, so such an update costs a fraction of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from scumble_trainers.captions import TextEncoders
from scumble_trainers.draws import generator, picture_order
from scumble_trainers.progress import Report
from scumble_trainers.vision import PictureStates

BATCH = 96
LOST = 0.2
"""Share of a picture's states that is left out at each update: pictures are few, and places must not be learnt."""


@dataclass(frozen=True, slots=True)
class Said:
    """The states of what is said of pictures, cut to as many as a picture has tokens."""

    states: Tensor  # (U, T, D)
    of: Tensor  # (N,) int64: each picture's row

    @classmethod
    @torch.no_grad()
    def read(cls, encoders: TextEncoders, texts: Sequence[str], tokens: int, device: torch.device) -> Said:
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        parts = encoders.tokenise(list(rows)).split(BATCH)
        states = torch.cat([encoders(part.to(device)).states[:, :tokens].float().cpu() for part in parts])
        return cls(states, torch.tensor([rows[text] for text in texts]))


def align(
    projection: nn.Module,
    seen: PictureStates,
    said: Said,
    pictures: Tensor,
    *,
    updates: int,
    learning_rate: float,
    seed: int,
    report: Report,
) -> float:
    """Trains `projection` on `pictures (n,)`; returns the last update's mean squared error. A function of the seed."""
    optimiser = torch.optim.AdamW(projection.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    loss = torch.zeros(())
    for update in range(updates):
        order = picture_order(seed, update * BATCH, BATCH, len(pictures), "align")
        chosen = pictures[order]
        states = seen.of(chosen)
        kept = torch.rand(states.shape[:2], generator=generator(seed, "align", "lost", update)) >= LOST
        tokens = projection(states * kept[..., None].to(states))
        loss = functional.mse_loss(tokens, said.states[said.of[chosen]].to(tokens))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        report("tokens aligned", update + 1, updates, f"error {float(loss.detach()):.3f}")
    return float(loss.detach())
