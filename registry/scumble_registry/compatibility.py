"""What fits what, derived from the files alone.

A *target* is a weighted module of the base by its canonical name, e.g. `unet.mid_block.attentions.0.proj_in`
or `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`, with its weight's shape `(out, in)` or `(out,
in, k, k)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, SerializerFunctionWrapHandler, model_serializer

from scumble.errors import Incompatible, Refused

Shape = tuple[int, ...]
Family = Literal["sd1", "sd2", "sdxl"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""What the UNet says: the noise, the velocity (Salimans and Ho, 2202.00512), or the finished sample."""


class BaseCompatibility(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["base"] = "base"
    family: Family
    prediction_type: PredictionType
    in_channels: int
    """Of the UNet: 4 as a rule, 9 for inpainting bases."""
    latent_channels: int
    sample_size: int
    """Side of the latents that the base was trained at."""
    vae_scale: int
    """Pixels per latent: 8 as a rule."""
    cross_attention_dim: int
    text_widths: tuple[int, ...]
    """Hidden size of each text encoder."""
    targets: dict[str, Shape]

    @property
    def self_attention_widths(self) -> frozenset[int]:
        """Of the hidden states that the UNet's self-attentions read."""
        ends = (".attn1.to_q", ".attn1.to_k")
        return frozenset(
            shape[1] for name, shape in self.targets.items() if name.startswith("unet.") and name.endswith(ends)
        )


class LoraCompatibility(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["lora"] = "lora"
    family: Family | None
    """The base's, if one was named; else by the width of the text context, else None."""
    requires: dict[str, Shape]
    """Every target that it changes, norms among them, with the shape of its weight."""
    ranks: dict[str, int]
    """Of those that factors in a row say, how many columns they need; 0 where the weight is only stretched."""
    magnitudes: bool = False
    """Rows stretch or mix weights (DoRA, IA³, GLoRA), at least in part: what it does depends on the base's."""
    merged: tuple[str, ...] = ()
    """Targets that no factors say, sorted: they are merged into copies of the base's weights."""

    @model_serializer(mode="wrap")
    def _as_before(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A plain LoRA's manifest, and so its digest, is what it was before there were DoRAs and others."""
        data: dict[str, Any] = serialise(self)
        later = {"magnitudes": self.magnitudes, "merged": self.merged}
        return {key: value for key, value in data.items() if later.get(key, True)}

    def fits(self, base: BaseCompatibility) -> None:
        """Raises Incompatible, naming the first target (in sorted order) that does not match, and both
        shapes.
        """
        check_targets(self.requires, base)
        if self.magnitudes and (padded := [name for name in self.requires if is_padded(name, self.requires, base)]):
            raise Incompatible(
                f"the adapter stretches weights and changes {padded[0]} with {base.latent_channels} channels, of which "
                f"this base has {base.in_channels}: its lengths mean another weight; use the base that it was "
                "trained on",
                target=padded[0],
            )


class TextualInversionCompatibility(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["textual_inversion"] = "textual_inversion"
    family: Family | None
    """The base's, if one was named; else by the widths, else None."""
    widths: tuple[int, ...]
    """Of the vectors for each text encoder, in the base's order."""
    vectors: int
    """How many places in the prompt its token takes."""
    token: str
    """The word in a prompt that stands for it."""

    def fits(self, base: BaseCompatibility) -> None:
        """Raises Incompatible, naming both widths."""
        if self.widths != base.text_widths:
            raise Incompatible(
                f"the embedding has vectors of width {_show(self.widths)}, but the text encoders of this "
                f"{base.family} base have {_show(base.text_widths)}; use the base that it was trained on",
                adapter_widths=self.widths,
                base_widths=base.text_widths,
            )


class ContextNetworks(BaseModel):
    """A hypernetwork of the webui's kind: networks on what attention reads its keys and values from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["context"] = "context"
    widths: tuple[int, ...]
    """Of the contexts that it changes, rising: every attention that reads one of this width is changed."""
    structure: tuple[float, ...]
    """Width of each layer's input, and of the last one's output, as multiples of the context's."""
    activation: str
    activate_output: bool
    layer_norm: bool

    def fits(self, base: BaseCompatibility) -> None:
        """Raises Incompatible, naming the widths that nothing in the base has."""
        selves = base.self_attention_widths
        if wrong := sorted(set(self.widths) - selves - {base.cross_attention_dim}):
            raise Incompatible(
                f"the hypernetwork changes contexts of width {_list(wrong)}, but attention in this {base.family} base "
                f"reads text of width {base.cross_attention_dim} and hidden states of {_list(sorted(selves))}; "
                "use the base that it was trained on",
                adapter_widths=tuple(wrong),
                base_widths=(base.cross_attention_dim, *sorted(selves)),
            )


class WeightPredictor(BaseModel):
    """A hypernetwork that reads a picture or a text and predicts a LoRA."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["predictor"] = "predictor"
    condition: Literal["image", "text"]
    condition_width: int
    """Of the states that it reads: the image encoder's last but one, or the text encoder's last."""
    encoder: str | None
    """sha256 of the weights of the encoder that it was trained with, if its file says so."""
    lora: LoraCompatibility
    """Of what it predicts."""

    def fits(self, base: BaseCompatibility) -> None:
        """Raises Incompatible, naming the first target that does not match, or the widths of the text."""
        self.lora.fits(base)
        if self.condition == "text" and self.condition_width not in base.text_widths[:1]:
            raise Incompatible(
                f"the hypernetwork reads text of width {self.condition_width}, but the text encoder of this "
                f"{base.family} base gives {base.text_widths[0]}; use the base that it was trained on",
                adapter_width=self.condition_width,
                base_width=base.text_widths[0],
            )


class HypernetworkCompatibility(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["hypernetwork"] = "hypernetwork"
    family: Family | None
    """The base's, if one was named; else by the width of the text context, else None."""
    network: Annotated[ContextNetworks | WeightPredictor, Field(discriminator="type")]

    def fits(self, base: BaseCompatibility) -> None:
        """Raises Incompatible, naming what does not match."""
        self.network.fits(base)


IpAdapterKind = Literal["base", "full", "plus", "faceid", "faceid_plus", "face_resampler"]
"""How a picture becomes tokens: see `formats/ip_adapter/projection.py`."""


class ImageEncoderCompatibility(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["image_encoder"] = "image_encoder"
    family: None = None
    """Any base's pictures are pictures."""
    hidden_size: int
    """Of its states, which most IP-Adapters read."""
    projection_dim: int
    """Of its embedding, which `base` IP-Adapters read."""
    image_size: int
    patch_size: int

    def fits(self, base: BaseCompatibility) -> None:
        """An image encoder is for IP-Adapters; it is no adapter of a base. Raises Refused."""
        raise Refused(
            f"an image encoder is no adapter of this {base.family} base; publish IP-Adapters with --image-encoder REF"
        )


class VaeCompatibility(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["vae"] = "vae"
    family: None = None
    """Families share latents of one shape; that the colours are right, nobody can tell from a file."""
    latent_channels: int
    scale: int
    """Pixels per latent."""
    parameters: int
    """Numbers that it holds."""
    float32: bool = False
    """It overflows half precision."""

    def fits(self, base: BaseCompatibility) -> None:
        """Raises Incompatible, naming what the VAE has and what the base has."""
        for what, mine, its in (
            ("latents with channels", self.latent_channels, base.latent_channels),
            ("pixels per latent", self.scale, base.vae_scale),
        ):
            if mine != its:
                raise Incompatible(
                    f"the VAE has {what} {mine}, but this {base.family} base has {its}; use one of the base's family",
                    adapter=mine,
                    base=its,
                )


class IpAdapterCompatibility(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ip_adapter"] = "ip_adapter"
    family: Family
    projection: IpAdapterKind
    shortcut: bool = False
    """FaceID-PlusV2."""
    tokens: int | None
    """For one picture; None: as many as the image encoder has positions."""
    context: int
    """Width of its tokens: that of the base's text."""
    picture_width: int | None
    """What the image encoder must give: the width of its embedding (`base`) or of its states; None: no picture."""
    embedding_width: int | None
    """Of the embedding that the caller gives with each picture (FaceID), or None."""
    attentions: dict[str, int]
    """Each cross-attention of the base by canonical name → its width."""
    encoder: ImageEncoderCompatibility | None = None
    """The image encoder in the entry's own `image_encoder/`, if there is one."""
    lora: LoraCompatibility | None = None
    """FaceID's."""

    def fits(self, base: BaseCompatibility) -> None:
        """Raises Incompatible, naming the first cross-attention (in sorted order) that does not match."""
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
        """Raises Incompatible when this image encoder does not give what the projection reads, naming both widths."""
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


class ControlNetCompatibility(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["controlnet"] = "controlnet"
    form: Literal["net", "union", "t2i", "control_lora", "lllite"]
    family: Family | None
    """The base's, if one was named; else by the width of the text context, else None."""
    widths: tuple[int, ...]
    """Channels of each residual, the middle block's last; of a T2I-Adapter, of each feature."""
    conditioning_channels: int
    """Of the control picture: 3, or 1 for grey."""
    cross_attention_dim: int | None = None
    """None for a T2I-Adapter, which reads no text."""
    in_channels: int | None = None
    """Of the latents that it looks at; None for a T2I-Adapter, which does not."""
    control_types: int = 0
    """How many kinds of control a union net knows."""
    pools: bool = False
    """Residuals are averaged over all places (shuffle nets)."""
    pixels_per_latent: int = 8
    parameters: int
    """Numbers that it holds once it is loaded, beside those that it takes from the base."""
    modules: dict[str, int] = Field(default_factory=dict)
    """Of an LLLite: each module that it changes, by its name there → the width of what it reads."""

    @model_serializer(mode="wrap")
    def _as_before_modules(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Other nets' manifests, and so their digests, are what they were before there were LLLites."""
        data: dict[str, Any] = serialise(self)
        return data if self.modules else {key: value for key, value in data.items() if key != "modules"}

    def fits(self, base: BaseCompatibility) -> None:
        """Raises Incompatible, naming what the net has and what the base has."""
        if self.form == "lllite":
            self._match_modules(base)
            return
        t2i = self.form == "t2i"
        widths = feature_widths(base.targets) if t2i else residual_widths(base.targets)
        self._match("a text context of width", self.cross_attention_dim, base.cross_attention_dim, base)
        self._match("latents with channels", self.in_channels, base.latent_channels, base)
        self._match("pixels per latent", self.pixels_per_latent, base.vae_scale, base)
        self._match("features of widths" if t2i else "residuals of widths", self.widths, widths, base)

    def _match_modules(self, base: BaseCompatibility) -> None:
        from scumble_registry.formats.controlnet.lllite import canonical_names

        names = canonical_names(base.targets)
        for name, width in self.modules.items():
            shape = base.targets.get(names.get(name, ""), ())
            if len(shape) != 2 or shape[1] != width:
                raise Incompatible(
                    f"the net changes {name}, which reads {width} channels; this {base.family} base has "
                    f"{f'it as {_show(shape)}' if shape else 'no such module'}; use the base that it was trained on",
                    target=name,
                )

    def _match(self, what: str, mine: object, its: object, base: BaseCompatibility) -> None:
        if mine is not None and mine != its:
            raise Incompatible(
                f"the net has {what} {_say(mine)}, but this {base.family} base has {_say(its)}; "
                "use the base that it was trained on",
                adapter=mine,
                base=its,
            )


class DreamboothCompatibility(BaseModel):
    """A checkpoint that the base's own graphs run, with other weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["dreambooth"] = "dreambooth"
    family: Family
    prediction_type: PredictionType
    in_channels: int
    cross_attention_dim: int
    text_widths: tuple[int, ...]
    scheduler: dict[str, JsonValue]
    """Its own scheduler's config."""
    changed: dict[str, int]
    """By component, how many values differ from the base's."""

    def fits(self, base: BaseCompatibility) -> None:
        """Raises Incompatible. Its shapes were checked against the base that it was published for."""
        for name in ("family", "in_channels", "cross_attention_dim", "text_widths"):
            if getattr(self, name) != getattr(base, name):
                raise Incompatible(
                    f"the checkpoint has {name} {getattr(self, name)}, this base {getattr(base, name)}; "
                    "use the base that it was published for",
                    field=name,
                )


Compatibility = Annotated[
    BaseCompatibility
    | LoraCompatibility
    | TextualInversionCompatibility
    | ImageEncoderCompatibility
    | VaeCompatibility
    | IpAdapterCompatibility
    | ControlNetCompatibility
    | DreamboothCompatibility
    | HypernetworkCompatibility,
    Field(discriminator="kind"),
]
"""A new kind is one more class here."""


_NORMS = (
    (".conv1", ".norm1"),
    (".conv2", ".norm2"),
    (".proj_in", ".norm"),
    (".attn1.to_q", ".norm1"),
    (".attn2.to_q", ".norm2"),
    (".ff.net.0.proj", ".norm3"),
    ("unet.conv_out", "unet.conv_norm_out"),
    (".self_attn.q_proj", ".layer_norm1"),
    (".mlp.fc1", ".layer_norm2"),
)
"""How the name of a layer ends, and the name of the norm before it."""


def check_fit(adapter: Compatibility, base: Compatibility) -> None:
    """Raises Incompatible, or Refused when one of them is not what its place asks for."""
    if not isinstance(base, BaseCompatibility):
        raise Refused(f"a {base.kind} is not a base; name a version of kind base")
    if isinstance(adapter, BaseCompatibility):
        raise Refused("this is a base, not an adapter; a base stands alone")
    adapter.fits(base)


def check_targets(requires: Mapping[str, Shape], base: BaseCompatibility) -> None:
    """Raises Incompatible, naming the first target (in sorted order) that does not match, and both shapes."""
    norms = norm_shapes(base) if any(len(shape) == 1 for shape in requires.values()) else {}
    for target, shape in sorted(requires.items()):
        has = base.targets.get(target) or norms.get(target)
        if has is None:
            raise Incompatible(
                f"the adapter changes {target} {_show(shape)}, which this {base.family} base does not have; "
                "use the base that it was trained on",
                target=target,
                adapter_shape=shape,
                base_shape=None,
            )
        if matrix_shape(has) != matrix_shape(shape) and not is_padded(target, requires, base):
            raise Incompatible(
                f"the adapter changes {target} as {_show(shape)}, but in this {base.family} base "
                f"it is {_show(has)}; use the base that it was trained on",
                target=target,
                adapter_shape=shape,
                base_shape=has,
            )


def is_padded(target: str, requires: Mapping[str, Shape], base: BaseCompatibility) -> bool:
    """A change of the first convolution of a base that reads latents alone also fits one that reads a mask and a masked
    picture behind them (inpainting): it leaves those channels as they are.
    """
    has, shape = base.targets.get(target, ()), requires[target]
    return (
        target == "unet.conv_in"
        and len(shape) == 4
        and shape[1] == base.latent_channels < base.in_channels
        and has == (shape[0], base.in_channels, *shape[2:])
    )


def norm_shapes(base: BaseCompatibility) -> dict[str, Shape]:
    """Every norm of the UNet and the text encoders → (channels,), read from the layer that it stands before."""
    found: dict[str, Shape] = {}
    for target, shape in base.targets.items():
        for layer, norm in _NORMS:
            if target.endswith(layer):
                found[target.removesuffix(layer) + norm] = (shape[1],)
        if target.endswith(".mlp.fc1"):
            found[f"{target.partition('.encoder.')[0]}.final_layer_norm"] = (shape[1],)
    return dict(sorted(found.items()))


def has_bias(target: str) -> bool:
    """In these families' models every layer has one but the projections of the UNet's attention and of pooled text."""
    return not target.endswith((".to_q", ".to_k", ".to_v", ".text_projection"))


def matrix_shape(shape: Shape) -> Shape:
    """A 1x1 convolution is a matrix: SD 1's and SD 2's `proj_in` differ in nothing else."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _is_text_key(target: str) -> bool:
    return target.startswith("unet.") and target.endswith(".attn2.to_k")


def feature_widths(targets: dict[str, Shape]) -> tuple[int, ...]:
    """Channels that a UNet takes T2I-Adapters' features in: at each level, and in SDXL (whose first level has no
    attention, so that its feature comes behind the downsampler) in the middle block too.
    """
    widths = tuple(targets[f"unet.down_blocks.{level}.resnets.0.conv1"][0] for level in range(_levels(targets)))
    has_attention = any(name.startswith("unet.down_blocks.0.attentions.") for name in targets)
    return widths if has_attention else (*widths, widths[-1])


def residual_widths(targets: dict[str, Shape]) -> tuple[int, ...]:
    """Channels of each skip connection of a base's UNet, and of its middle block."""
    names = ["unet.conv_in"]
    for level in range(_levels(targets)):
        block = f"unet.down_blocks.{level}"
        count = sum(name.startswith(f"{block}.resnets.") and name.endswith(".conv1") for name in targets)
        names += [f"{block}.resnets.{i}.conv1" for i in range(count)]
        names += [name for name in (f"{block}.downsamplers.0.conv",) if name in targets]
    names += [name for name in ("unet.mid_block.resnets.0.conv1",) if name in targets]
    return tuple(targets[name][0] for name in names)


def _levels(targets: dict[str, Shape]) -> int:
    return sum(
        name.startswith("unet.down_blocks.") and name.endswith(".resnets.0.conv1") and name.count(".") == 5
        for name in targets
    )


def _say(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _show(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _list(widths: Iterable[int]) -> str:
    return ", ".join(map(str, widths)) or "none"
