"""A tiny random Stable Diffusion 1.x in the diffusers layout, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


def tiny_tokenizer() -> CLIPTokenizer:
    """Every byte is a token, with and without the end of a word: any text has ids, no merges are needed."""
    symbols = list(bytes_to_unicode().values())
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def make_tiny_base(folder: Path, seed: int = 0, width: int = 16) -> Path:
    """SD 1.5's classes and block types at toy width: 64x64 pixels, 8x8 latents. Same seed, same weights."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
    )
    # SD 1.5's own schedule.
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


FULL_TARGETS = [
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "linear_1",
    "linear_2",
    "conv_in",
    "conv_out",
    "conv",
]
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def make_lora(
    base: Path,
    folder: Path,
    *,
    seed: int,
    rank: int = 4,
    text: bool = True,
    full: bool = False,
    alphas: dict[str, float] | None = None,
    dora: bool = False,
) -> Path:
    """A random LoRA of PEFT's making in the diffusers layout, over every target of the small or the full layout.

    Of a DoRA the magnitudes are those of the base's weights, times a random number about 1.
    """
    pipeline = DiffusionPipeline.from_pretrained(base, local_files_only=True)
    texts = [name for name in ("text_encoder", "text_encoder_2") if name in pipeline.components]
    torch.manual_seed(seed)
    layers, metadata = {}, {}
    for component, targets in (
        ("unet", UNET_TARGETS + (FULL_TARGETS if full else [])),
        *((name, TEXT_TARGETS if text else []) for name in texts),
    ):
        model = pipeline.components[component]
        if not targets:
            continue
        config = LoraConfig(
            r=rank,
            lora_alpha=rank * 2,
            target_modules=targets,
            init_lora_weights=False,
            alpha_pattern=alphas or {},
            use_dora=dora,
        )
        model.add_adapter(config)
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
        metadata[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipeline.save_lora_weights(folder, **layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"
