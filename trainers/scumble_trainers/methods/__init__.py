"""The methods that can be trained: their settings, and where their model is (imported only when it is run)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from scumble_trainers.methods.controlnet.settings import ControlNetSettings
from scumble_trainers.methods.dreambooth.settings import DreamboothSettings
from scumble_trainers.methods.hypernetwork.settings import HypernetworkSettings
from scumble_trainers.methods.ip_adapter.settings import IpAdapterSettings
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.methods.textual_inversion.settings import TextualInversionSettings
from scumble_trainers.settings import TrainSettings

if TYPE_CHECKING:
    from scumble_trainers.method import Method


@dataclass(frozen=True, slots=True)
class Entry:
    """One method. `name` is its module's and its adapters' kind."""

    name: str
    model: str
    """Class in `methods/NAME/model.py`."""
    settings: type[TrainSettings]
    help: str

    @property
    def command(self) -> str:
        return self.name.replace("_", "-")

    def load(self) -> type[Method[Any]]:
        """Its class; imports torch and diffusers."""
        found: type[Method[Any]] = getattr(import_module(f"{__name__}.{self.name}.model"), self.model)
        return found


AGAIN = "Continues from its newest checkpoint when the same command runs again in the same --out."

METHODS = (
    Entry("lora", "Lora", LoraSettings, f"Train a LoRA on captioned pictures, and publish it.\n\n{AGAIN}"),
    Entry(
        "ip_adapter",
        "IpAdapter",
        IpAdapterSettings,
        f"Train an IP-Adapter (pictures as prompts) on captioned pictures, and publish it.\n\n{AGAIN}",
    ),
    Entry(
        "controlnet",
        "ControlNet",
        ControlNetSettings,
        f"Train a ControlNet (the shape from a control picture), and publish it.\n\n{AGAIN}",
    ),
    Entry(
        "textual_inversion",
        "TextualInversion",
        TextualInversionSettings,
        f"Teach the base a new word from a few pictures, and publish it.\n\n{AGAIN}",
    ),
    Entry(
        "dreambooth",
        "Dreambooth",
        DreamboothSettings,
        f"Fine-tune the whole base on a few pictures of one thing, and publish the difference.\n\n{AGAIN}",
    ),
    Entry(
        "hypernetwork",
        "Hypernetwork",
        HypernetworkSettings,
        "Train a network that predicts a LoRA from one picture, on pictures of many concepts, and publish it.\n\n"
        f"With --refine N it takes one's prediction N steps further instead, and publishes a LoRA.\n\n{AGAIN}",
    ),
)
