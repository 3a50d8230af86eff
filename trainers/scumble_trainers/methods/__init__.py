"""The table of training methods: their settings, and their models, which are imported only when run."""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from scumble_trainers.methods.controlnet.settings import ControlNetSettings
from scumble_trainers.methods.dreambooth.settings import DreamboothSettings
from scumble_trainers.methods.hypernetwork.settings import HypernetworkSettings
from scumble_trainers.methods.ip_adapter.settings import IpAdapterSettings
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.methods.textual_inversion.settings import TextualInversionSettings
from scumble_trainers.settings import TrainSettings

if TYPE_CHECKING:
    from scumble_trainers.method import TrainingMethod


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """One method. `name` is the name of its module and its adapters' kind."""

    name: str
    model: str
    """Where its class is, as `module:Class`; imported only when it is trained."""
    settings: type[TrainSettings]
    help: str

    @property
    def command(self) -> str:
        return self.name.replace("_", "-")

    def load(self) -> type[TrainingMethod[Any]]:
        """Import its class, and with it torch and diffusers."""
        method: type[TrainingMethod[Any]] = resolve_name(self.model)
        return method


AGAIN = "Continues from its newest checkpoint when the same command runs again in the same --out."

METHODS = (
    MethodEntry(
        "lora",
        "scumble_trainers.methods.lora.model:LoraTraining",
        LoraSettings,
        f"Train a LoRA on captioned pictures, and publish it.\n\n{AGAIN}",
    ),
    MethodEntry(
        "ip_adapter",
        "scumble_trainers.methods.ip_adapter.model:IpAdapterTraining",
        IpAdapterSettings,
        f"Train an IP-Adapter (pictures as prompts) on captioned pictures, and publish it.\n\n{AGAIN}",
    ),
    MethodEntry(
        "controlnet",
        "scumble_trainers.methods.controlnet.model:ControlNetTraining",
        ControlNetSettings,
        f"Train a ControlNet (the shape from a control picture), and publish it.\n\n{AGAIN}",
    ),
    MethodEntry(
        "textual_inversion",
        "scumble_trainers.methods.textual_inversion.model:TextualInversionTraining",
        TextualInversionSettings,
        f"Teach the base a new word from a few pictures, and publish it.\n\n{AGAIN}",
    ),
    MethodEntry(
        "dreambooth",
        "scumble_trainers.methods.dreambooth.model:DreamboothTraining",
        DreamboothSettings,
        f"Fine-tune the whole base on a few pictures of one thing, and publish the difference.\n\n{AGAIN}",
    ),
    MethodEntry(
        "hypernetwork",
        "scumble_trainers.methods.hypernetwork.model:HypernetworkTraining",
        HypernetworkSettings,
        "Train a network that predicts a LoRA from one picture, on pictures of many concepts, and publish it.\n\n"
        f"With --refine N it trains a network's prediction for N more steps instead, and publishes a LoRA.\n\n{AGAIN}",
    ),
)
