"""Compatibility of an IP-Adapter with a base and an image encoder."""

from __future__ import annotations

from typing import Literal

from scumble.errors import Incompatible
from scumble_registry.compatibility.base import BaseCompatibility, Compatibility, Family
from scumble_registry.compatibility.image_encoder import ImageEncoderCompatibility
from scumble_registry.compatibility.lora import LoraCompatibility

IpAdapterKind = Literal["base", "full", "plus", "faceid", "faceid_plus", "face_resampler"]
"""How an image becomes tokens: see `formats/ip_adapter/projection.py`."""


class IpAdapterCompatibility(Compatibility):
    kind: Literal["ip_adapter"] = "ip_adapter"
    family: Family
    projection: IpAdapterKind
    shortcut: bool = False
    """Whether a FaceID-Plus is a PlusV2, which adds the embedding's tokens to the resampler's."""
    tokens: int | None
    """Number of tokens for one image; None: as many as the image encoder has positions."""
    context: int
    """Width of its tokens, which is that of the base's text context."""
    picture_width: int | None
    """Width of the image encoder's embedding (`base`) or hidden states that it reads; None: it reads no image."""
    embedding_width: int | None
    """Width of the embedding that the caller sends with each image (FaceID), or None."""
    attentions: dict[str, int]
    """Canonical name of each cross-attention of the base → its width."""
    encoder: ImageEncoderCompatibility | None = None
    """The image encoder in the adapter's own `image_encoder/`, if there is one."""
    lora: LoraCompatibility | None = None
    """The LoRA of a FaceID."""

    def fits(self, base: BaseCompatibility) -> None:
        """Check the fit. Raises Incompatible, naming the first cross-attention (in sorted order) that differs."""
        if self.context != base.cross_attention_dim:
            raise Incompatible(
                f"the IP-Adapter's tokens have width {self.context}, but text in this {base.family} base has "
                f"{base.cross_attention_dim}; use the base that it was trained on",
                adapter_width=self.context,
                base_width=base.cross_attention_dim,
            )
        has = {name.removesuffix(".to_k"): out for name, (out, *_) in base.targets.items() if _is_text_key(name)}
        for name in sorted(has.keys() | self.attentions.keys()):
            if has.get(name) != self.attentions.get(name):
                raise Incompatible(
                    f"{name} has width {self.attentions.get(name)} in the IP-Adapter and {has.get(name)} in this "
                    f"{base.family} base; use the base that it was trained on",
                    target=name,
                )
        if self.lora is not None:
            self.lora.fits(base)

    def check_encoder(self, encoder: ImageEncoderCompatibility) -> None:
        """Check that the encoder's output has the projection's input width. Raises Incompatible with both widths."""
        if self.picture_width is None:
            raise Incompatible("this FaceID reads embeddings, not pictures; publish it without an image encoder")
        gives = encoder.projection_dim if self.projection == "base" else encoder.hidden_size
        if gives != self.picture_width:
            raise Incompatible(
                f"the IP-Adapter reads pictures at width {self.picture_width}, but this image encoder gives {gives}; "
                "use the image encoder that it was trained with",
                adapter_width=self.picture_width,
                encoder_width=gives,
            )


def _is_text_key(target: str) -> bool:
    return target.startswith("unet.") and target.endswith(".attn2.to_k")
