"""Adapters of LyCORIS' own making on the tiny bases: its modules hold random numbers, its code draws with them.

LyCORIS 4.1.3's forward is right for every algorithm (its `get_merged_weight` is not for LoHa and LoKr), so a pipeline
whose layers it took over is the oracle of a file that it saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

logging.getLogger("LyCORIS").setLevel(logging.ERROR)

from lycoris.modules.boft import ButterflyOFTModule  # noqa: E402 - quiet before it speaks
from lycoris.modules.diag_oft import DiagOFTModule  # noqa: E402
from lycoris.modules.full import FullModule  # noqa: E402
from lycoris.modules.glora import GLoRAModule  # noqa: E402
from lycoris.modules.ia3 import IA3Module  # noqa: E402
from lycoris.modules.locon import LoConModule  # noqa: E402
from lycoris.modules.loha import LohaModule  # noqa: E402
from lycoris.modules.lokr import LokrModule  # noqa: E402
from lycoris.modules.norms import NormModule  # noqa: E402

Make = Callable[[str, nn.Module], Any]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How LyCORIS makes a module, and how strong its random numbers are."""

    kind: Any
    options: Mapping[str, Any]
    strength: float = 0.2
    rank: int = 2
    alpha: float = 3.0

    def make(self, name: str, layer: nn.Module) -> Any:
        if self.kind is NormModule:
            return NormModule(name, layer)
        return self.kind(name, layer, 1.0, self.rank, self.alpha, **self.options)


DORA = {"weight_decompose": True}
ALGORITHMS = {
    "LoCon": Algorithm(LoConModule, {}),
    "LoCon, Tucker": Algorithm(LoConModule, {"use_tucker": True}, strength=0.3),
    "LoCon, rank-stabilised": Algorithm(LoConModule, {"rs_lora": True}),
    "LoHa": Algorithm(LohaModule, {}, strength=0.35),
    "LoHa, Tucker": Algorithm(LohaModule, {"use_tucker": True}, strength=0.5),
    "LoHa of high rank": Algorithm(LohaModule, {}, strength=0.25, rank=6),
    "LoKr": Algorithm(LokrModule, {"factor": 4}, strength=0.35, rank=1),
    "LoKr, both halves factored": Algorithm(LokrModule, {"factor": 4, "decompose_both": True}, strength=0.5, rank=1),
    "LoKr, Tucker": Algorithm(LokrModule, {"factor": 2, "use_tucker": True}, strength=0.5, rank=2),
    "LoKr, whole matrices": Algorithm(LokrModule, {"full_matrix": True}, strength=0.2),
    "IA³": Algorithm(IA3Module, {}, strength=0.5),
    "IA³ on inputs": Algorithm(IA3Module, {"train_on_input": True}, strength=0.5),
    "full": Algorithm(FullModule, {}, strength=0.05),
    "GLoRA": Algorithm(GLoRAModule, {}),
    "OFT": Algorithm(DiagOFTModule, {}, strength=0.2, rank=4),
    "OFT, constrained and rescaled": Algorithm(
        DiagOFTModule, {"constraint": 0.05, "rescaled": True}, strength=0.3, rank=4
    ),
    "BOFT": Algorithm(ButterflyOFTModule, {}, strength=0.15, rank=4),
    "norms": Algorithm(NormModule, {}, strength=0.3),
    "DoRA": Algorithm(LoConModule, DORA, strength=0.15),
    "DoRA by columns": Algorithm(LoConModule, {**DORA, "wd_on_out": False}, strength=0.15),
    "DoRA on LoHa": Algorithm(LohaModule, DORA, strength=0.3),
    "DoRA on LoKr": Algorithm(LokrModule, {**DORA, "factor": 4}, strength=0.3, rank=1),
    "DoRA on LoHa of high rank": Algorithm(LohaModule, DORA, strength=0.25, rank=6),
}
LINEAR = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v", "ff.net.0.proj", "ff.net.2", "time_emb_proj")
CONVOLUTIONS = ("proj_in", "conv1", "downsamplers.0.conv", "conv_shortcut")
TEXT = ("self_attn.v_proj", "mlp.fc1")


def layers(model: nn.Module, ends: Iterable[str]) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if name.endswith(tuple(ends))}


def adapt(algorithm: Algorithm, chosen: Mapping[str, nn.Module], seed: int) -> dict[str, Any]:
    """LyCORIS takes the layers over; name → its module. Their model draws with them from now on."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in sorted(chosen.items()):
        module = algorithm.make(name.replace(".", "_"), layer)
        for role, values in module.named_parameters():
            noise = torch.randn(values.shape, generator=generator)
            if role in {"dora_scale", "rescale"}:
                values.data *= 1 + 0.2 * noise
            else:
                values.data = algorithm.strength * noise
        module.apply_to()
        made[name] = module
    return made


def state(made: Mapping[str, Any], spell: Callable[[str], str]) -> dict[str, Tensor]:
    """As LyCORIS saves it, with each module's name spelled so."""
    found = {}
    for name, module in made.items():
        parts = module.custom_state_dict() or module.state_dict()
        found |= {f"{spell(name)}.{part}": values.detach().clone().contiguous() for part, values in parts.items()}
    return found


def save(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, file, metadata or {})
    return file
