"""Random hypernetworks of both kinds, as their trainers' files would be, and the webui's own formula."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scumble_build.graphs.predictor import Predictor
from scumble_registry.formats.hypernetwork.predictor import PredictorConfig, write_record

WEBUI_ACTIVATIONS = {
    "linear": nn.Identity,
    "swish": nn.Hardswish,
    **{
        each.__name__.lower(): each
        for each in vars(nn.modules.activation).values()
        if isinstance(each, type) and each.__module__ == "torch.nn.modules.activation"
    },
}


def webui_sequence(
    width: int,
    structure: Sequence[float],
    activation: str,
    *,
    norm: bool = False,
    activate_output: bool = True,
    dropout: Sequence[float] = (),
) -> nn.Sequential:
    """The layers of one side in the order and with the numbers that the webui gives them."""
    layers: list[nn.Module] = []
    for i in range(len(structure) - 1):
        layers.append(nn.Linear(int(width * structure[i]), int(width * structure[i + 1])))
        is_last = i == len(structure) - 2
        if activation != "linear" and (activate_output or not is_last):
            layers.append(WEBUI_ACTIVATIONS[activation]())
        if norm:
            layers.append(nn.LayerNorm(int(width * structure[i + 1])))
        if dropout and dropout[i + 1]:
            layers.append(nn.Dropout(dropout[i + 1]))
    return nn.Sequential(*layers)


class WebuiHypernetwork:
    """As the webui holds one: width → networks for keys and values."""

    def __init__(self, widths: Sequence[int], *, seed: int, gain: float = 1.0, **how: object) -> None:
        torch.manual_seed(seed)
        self.how = {"structure": (1, 2, 1), "activation": "relu", "norm": False, "activate_output": True, **how}
        self.sides = {width: tuple(webui_sequence(width, **self.how).eval() for _ in "kv") for width in widths}  # type: ignore[arg-type]
        for networks in self.sides.values():
            for parameter in (each for network in networks for each in network.parameters()):
                parameter.requires_grad_(False)
                parameter.copy_(torch.randn(parameter.shape) * gain * parameter.shape[-1] ** -0.5)

    def __call__(self, keys: Tensor, values: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        if keys.shape[-1] not in self.sides:
            return keys, values
        of_keys, of_values = self.sides[keys.shape[-1]]
        return keys + weight * of_keys(keys), values + weight * of_values(values)

    def metadata(self) -> dict[str, str]:
        return {
            "layer_structure": str(list(self.how["structure"])),  # type: ignore[call-overload]
            "activation_func": str(self.how["activation"]),
            "is_layer_norm": str(self.how["norm"]),
            "activate_output": str(self.how["activate_output"]),
            "use_dropout": str(bool(self.how.get("dropout"))),
        }

    def save(self, file: Path) -> Path:
        tensors = {
            f"{width}.{side}.linear.{name}": values
            for width, networks in self.sides.items()
            for side, network in zip("kv", networks, strict=True)
            for name, values in network.state_dict().items()
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, self.metadata())
        return file


class WebuiAttention:
    """The formula: `acting` are the networks of the step at their weights, in the order of the request."""

    def __init__(self) -> None:
        self.acting: list[tuple[WebuiHypernetwork, float]] = []

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        of_keys, of_values = context, context
        for network, weight in self.acting:
            of_keys, of_values = network(of_keys, of_values, weight)
        q, k, v = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(of_keys), attn.to_v(of_values))
        )
        mixed = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def save_webui(network: WebuiHypernetwork, file: Path, *, old: bool = False) -> Path:
    """As the webui saves one; `old` names the two layers as its first versions did, without settings."""
    how = network.how
    content: dict[str | int, object] = {
        width: tuple(_layers(each.state_dict(), old=old) for each in networks)
        for width, networks in network.sides.items()
    }
    settings = {
        "step": 10,
        "name": "ink",
        "layer_structure": list(how["structure"]),  # type: ignore[call-overload]
        "activation_func": how["activation"],
        "is_layer_norm": how["norm"],
        "weight_initialization": "Normal",
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "activate_output": how["activate_output"],
        "use_dropout": bool(how.get("dropout")),
        "dropout_structure": list(how["dropout"]) if how.get("dropout") else None,  # type: ignore[call-overload]
        "last_layer_dropout": False,
        "optional_info": "",
    }
    torch.save(content if old else content | settings, file)
    return file


def _layers(state: dict[str, Tensor], *, old: bool) -> dict[str, Tensor]:
    names = {"0": "linear1", "1": "linear2"} if old else {}
    parts = [(name.partition("."), values) for name, values in state.items()]
    return {f"{names.get(place, f'linear.{place}')}.{role}": values for (place, _, role), values in parts}


def make_predictor(
    targets: dict[str, tuple[int, ...]], condition_width: int, *, seed: int = 0, gain: float = 1.0, **changes: object
) -> Predictor:
    """`targets` with their weights' shapes; `gain` makes what it predicts louder."""
    fields = {"condition": "image", "width": 16, "heads": 2, "depth": 2, "passes": 3, "rank": 2, "a": 6, "b": 5}
    config = PredictorConfig.model_validate({**fields, "alpha": 3.0, "targets": sorted(targets), **changes})
    torch.manual_seed(seed)
    up = {name: nn.init.orthogonal_(torch.empty(shape[0], config.a)) for name, shape in targets.items()}
    down = {name: nn.init.orthogonal_(torch.empty(config.b, shape[1])) for name, shape in targets.items()}
    predictor = Predictor(config, condition_width, up, down).eval().requires_grad_(False)
    predictor.queries.copy_(torch.randn(predictor.queries.shape))
    predictor.condition.weight.mul_(4.0)  # so that another picture is seen to be another
    predictor.head.weight.mul_(gain)
    return predictor


def save_predictor(predictor: Predictor, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(write_record(predictor.record()))
    return file
