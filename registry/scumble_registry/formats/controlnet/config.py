"""The `config.json` of diffusers' nets: the values that can be served."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scumble.errors import Refused

_Width = Field(ge=1, le=1 << 14)
Layers = Annotated[int, Field(ge=1, le=32)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class NetConfig(_Config):
    """The config of a ControlNetModel or ControlNetUnionModel; other fields' values must be those of known nets."""

    in_channels: int = _Width
    conditioning_channels: int = Field(default=3, ge=1, le=16)
    block_out_channels: tuple[int, ...] = Field(min_length=1, max_length=8)
    layers_per_block: int = Field(default=2, ge=1, le=8)
    transformer_layers_per_block: Layers | tuple[Layers, ...] = 1
    only_cross_attention: Literal[False] = False
    cross_attention_dim: int = _Width
    down_block_types: tuple[Literal["CrossAttnDownBlock2D", "DownBlock2D"], ...]
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] = "UNetMidBlock2DCrossAttn"
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    global_pool_conditions: bool = False
    num_control_type: int = Field(default=6, ge=1, le=64)
    num_trans_layer: Layers = 1
    addition_embed_type: Literal["text_time"] | None = None
    class_embed_type: None = None
    num_class_embeds: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None

    @property
    def residual_widths(self) -> tuple[int, ...]:
        """Channels of each residual, the middle block's last."""
        widths = [self.block_out_channels[0]]
        last = len(self.block_out_channels) - 1
        for level, width in enumerate(self.block_out_channels):
            widths += [width] * (self.layers_per_block + (level != last))
        return (*widths, self.block_out_channels[-1])


class T2IConfig(_Config):
    """The config of a T2IAdapter."""

    in_channels: int = Field(default=3, ge=1, le=16)
    channels: tuple[int, ...] = Field(default=(320, 640, 1280, 1280), min_length=1, max_length=8)
    num_res_blocks: int = Field(default=2, ge=1, le=16)
    downscale_factor: int = Field(default=8, ge=1, le=64)
    adapter_type: Literal["full_adapter", "light_adapter", "full_adapter_xl"] = "full_adapter"

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """Channels of each feature."""
        return (*self.channels, self.channels[-1]) if self.adapter_type == "light_adapter" else self.channels


def parse_net(config: dict[str, Any]) -> NetConfig:
    """Validate a config. Raises Refused naming every field that cannot be served."""
    try:
        return NetConfig.model_validate(config)
    except ValidationError as error:
        raise _explain(error) from error


def parse_t2i(config: dict[str, Any]) -> T2IConfig:
    """Validate a config. Raises Refused naming every field that cannot be served."""
    try:
        return T2IConfig.model_validate(config)
    except ValidationError as error:
        raise _explain(error) from error


def _explain(error: ValidationError) -> Refused:
    problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    return Refused(f"config.json describes a net that cannot be served: {'; '.join(problems)}")
