"""Which adapter fits which base, derived from the files alone: one module per kind, and names and shapes of targets."""

from __future__ import annotations

from scumble_registry.compatibility.base import BaseCompatibility, Compatibility, Family, PredictionType
from scumble_registry.compatibility.controlnet import ControlNetCompatibility, feature_widths, residual_widths
from scumble_registry.compatibility.dreambooth import DreamboothCompatibility
from scumble_registry.compatibility.hypernetwork import ContextNetworks, HypernetworkCompatibility, WeightPredictor
from scumble_registry.compatibility.image_encoder import ImageEncoderCompatibility
from scumble_registry.compatibility.ip_adapter import IpAdapterCompatibility, IpAdapterKind
from scumble_registry.compatibility.kinds import StoredCompatibility, kinds
from scumble_registry.compatibility.lora import LoraCompatibility
from scumble_registry.compatibility.shapes import Shape, matrix_shape
from scumble_registry.compatibility.targets import (
    canonical_name,
    check_targets,
    has_bias,
    is_padded,
    lllite_names,
    norm_shapes,
)
from scumble_registry.compatibility.textual_inversion import TextualInversionCompatibility
from scumble_registry.compatibility.vae import VaeCompatibility, vae_scale

__all__ = [
    "BaseCompatibility",
    "Compatibility",
    "ContextNetworks",
    "ControlNetCompatibility",
    "DreamboothCompatibility",
    "Family",
    "HypernetworkCompatibility",
    "ImageEncoderCompatibility",
    "IpAdapterCompatibility",
    "IpAdapterKind",
    "LoraCompatibility",
    "PredictionType",
    "Shape",
    "StoredCompatibility",
    "TextualInversionCompatibility",
    "VaeCompatibility",
    "WeightPredictor",
    "canonical_name",
    "check_targets",
    "feature_widths",
    "has_bias",
    "is_padded",
    "kinds",
    "lllite_names",
    "matrix_shape",
    "norm_shapes",
    "residual_widths",
    "vae_scale",
]
