"""Computes the memory of training at the real sizes of SD 1.5, 2.1 and XL, without allocating it.

Weights are counted. Activations are the tensors that autograd keeps in one forward pass, counted on the meta device,
where tensors have shapes but no data: once per storage, without parameters, with a fused attention kernel. With
gradient checkpointing each block keeps its inputs, and the largest block is computed again. Prints JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from measure import machine
from memory import FAMILIES, FULL_VAE, FamilyConfigs
from peft import LoraConfig
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

LORA = ["to_q", "to_k", "to_v", "to_out.0"]
RANK = 16
WORK, MASTER = torch.bfloat16, 16
"""Bytes per number: of frozen weights and activations; of a trained parameter (fp32 value, gradient,
Adam's moments).
"""
CUDA = 1.0  # GiB of context and kernels
GIB = 2**30


class FusedAttention(torch.autograd.Function):
    """Keeps what FlashAttention keeps: inputs, output and one number per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


@contextmanager
def fused_attention() -> Iterator[None]:
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: FusedAttention.apply(q, k, v)  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def number(tensor: Tensor) -> int:
    """Return an identifier of a tensor's storage; on the meta device all addresses are 0."""
    return StorageWeakRef(tensor.untyped_storage()).cdata


class SavedActivations:
    """Counts the bytes of storages that autograd keeps within `counting`."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._ours = {number(p) for module in modules for p in module.parameters()}
        self._seen: dict[int, Tensor] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        def pack(tensor: Tensor) -> Tensor:
            storage = number(tensor)
            if storage not in self._ours:
                self._seen.setdefault(storage, tensor)  # kept alive, so that its id is not reused
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._seen.values())


def activations(modules: list[nn.Module], blocks: list[nn.Module], forward: Callable[[], Any]) -> dict[str, float]:
    """Return the GiB that `forward` keeps, without and with `blocks` checkpointed."""
    whole, inside, ends, stack = SavedActivations(modules), [], [0], []

    def enter(_block: nn.Module, arguments: Any, named: Any) -> None:
        tensors = [value for value in [*arguments, *named.values()] if isinstance(value, Tensor)]
        ends[0] += sum(value.numel() * value.element_size() for value in tensors)
        own = SavedActivations(modules)
        context = own.counting()
        context.__enter__()
        stack.append((own, context))

    def leave(*_: Any) -> None:
        own, context = stack.pop()
        context.__exit__(None, None, None)
        inside.append(own.bytes)

    with whole.counting():
        forward()
    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    outside = SavedActivations(modules)
    with outside.counting():
        forward()
    for hook in hooks:
        hook.remove()
    return {"whole": whole.bytes / GIB, "checkpointed": (outside.bytes + ends[0] + max(inside)) / GIB}


def unet_blocks(unet: Any) -> list[nn.Module]:
    """Return the blocks that `enable_gradient_checkpointing` computes again: resnets and transformer blocks."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    return [module for module in unet.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)]


def inputs(family: FamilyConfigs, batch: int) -> dict[str, Any]:
    width = family.unet["cross_attention_dim"]
    given: dict[str, Any] = {
        "sample": torch.empty(batch, 4, family.latents, family.latents, dtype=WORK, device="meta"),
        "timestep": torch.empty(batch, device="meta"),
        "encoder_hidden_states": torch.empty(batch, 77, width, dtype=WORK, device="meta"),
    }
    if "addition_embed_type" in family.unet:
        pooled = torch.empty(batch, 1280, dtype=WORK, device="meta")
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.empty(batch, 6, device="meta")}
    return given


def unet_of(family: FamilyConfigs, dtype: torch.dtype = WORK) -> Any:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=family.latents, **family.unet).to(dtype)
    return unet.requires_grad_(False)


def lora(family: FamilyConfigs, batch: int) -> tuple[int, dict[str, float]]:
    unet = unet_of(family)
    with torch.device("meta"):
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LORA))
    return trained(unet), activations([unet], unet_blocks(unet), lambda: unet(**inputs(family, batch)))


def dreambooth(family: FamilyConfigs, batch: int) -> tuple[int, dict[str, float]]:
    unet = unet_of(family).requires_grad_(True)
    return trained(unet), activations([unet], unet_blocks(unet), lambda: unet(**inputs(family, batch)))


def textual_inversion(family: FamilyConfigs, batch: int) -> tuple[int, dict[str, float]]:
    """Count textual inversion: gradients pass through the whole UNet to the text."""
    unet, given = unet_of(family), inputs(family, batch)
    given["encoder_hidden_states"].requires_grad_()
    vectors = sum(config["hidden_size"] for _, config in family.texts)
    return vectors, activations([unet], unet_blocks(unet), lambda: unet(**given))


def ip_adapter(family: FamilyConfigs, batch: int) -> tuple[int, dict[str, float]]:
    """Count an IP-Adapter of 4 tokens with ViT-H's embedding (1024 wide)."""
    unet, context = unet_of(family), family.unet["cross_attention_dim"]
    processors = dict(unet.attn_processors)
    count = 1024 * 4 * context
    for name in processors:
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            with torch.device("meta"):
                added = IPAdapterAttnProcessor2_0(hidden, context, num_tokens=[4], scale=1.0).to(WORK)
            processors[name] = added
            count += trained(added)
    unet.set_attn_processor(processors)
    given = inputs(family, batch)
    tokens = torch.empty(batch, 1, 4, context, dtype=WORK, device="meta")
    given["encoder_hidden_states"] = (given["encoder_hidden_states"], [tokens])
    return count, activations([unet], unet_blocks(unet), lambda: unet(**given))


def hypernetwork(family: FamilyConfigs, batch: int) -> tuple[int, dict[str, float]]:
    """Count a hypernetwork: each layer's factors of every row, without the network's own states."""
    _, activations = lora(family, batch)
    layers = sum(name.endswith(tuple(LORA)) for name, _ in unet_of(family).named_modules())
    width, depth, coefficients = 128, 3, 64
    return depth * 16 * width**2 + (1024 + layers + 2 * coefficients) * width, activations


def controlnet(family: FamilyConfigs, batch: int) -> tuple[int, dict[str, float]]:
    """Count a ControlNet: gradients pass through the net and the UNet's decoder, which reads its output."""
    unet = unet_of(family)
    with torch.device("meta"):
        net: Any = ControlNetModel.from_unet(unet, load_weights_from_unet=False).to(WORK)
    net.requires_grad_(True)
    side = 8 * family.latents
    picture = torch.empty(batch, 3, side, side, dtype=WORK, device="meta")

    def forward() -> None:
        given = inputs(family, batch)
        down, middle = net(**given, controlnet_cond=picture, return_dict=False)
        unet(**given, down_block_additional_residuals=down, mid_block_additional_residual=middle)

    return trained(net), activations([unet, net], unet_blocks(unet) + unet_blocks(net), forward)


METHODS: dict[str, Callable[[FamilyConfigs, int], tuple[int, dict[str, float]]]] = {
    "lora": lora,
    "textual_inversion": textual_inversion,
    "dreambooth": dreambooth,
    "hypernetwork": hypernetwork,
    "ip_adapter": ip_adapter,
    "controlnet": controlnet,
}


def trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def frozen(family: FamilyConfigs, method: str) -> float:
    """Return GiB of frozen weights: text encoders and UNet in 16 bits (DreamBooth: without UNet),
    autoencoder in fp32.
    """
    with torch.device("meta"):
        parts = [AutoencoderKL(**FULL_VAE)]
        texts = [kind(kind.config_class(**config)) for kind, config in family.texts]
    size = sum(4 * p.numel() for part in parts for p in part.parameters())
    size += sum(2 * p.numel() for part in texts for p in part.parameters())
    if method != "dreambooth":
        size += sum(2 * p.numel() for p in unet_of(family).parameters())
    return size / GIB


def estimate(name: str, method: str) -> dict[str, float]:
    family = FAMILIES[name]
    with fused_attention():
        count, one = METHODS[method](family, 1)
        _, two = METHODS[method](family, 2)
    weights, states = frozen(family, method), MASTER * count / GIB
    casts = 2 * count / GIB  # autocast keeps 16-bit copies of trained weights
    fixed = CUDA + weights + states + casts
    figures = {"trained_millions": count / 1e6, "frozen": weights, "trained": states + casts}
    for kind in ("whole", "checkpointed"):
        more = two[kind] - one[kind]
        figures |= {f"{kind}_first": fixed + one[kind], f"{kind}_each": more}
        for card in (24, 80):
            figures[f"{kind}_batch_in_{card}"] = max(0, int((card / 1.073741824 - fixed - one[kind]) / more + 1))
    return {key: round(value, 2) for key, value in figures.items()}


def main() -> None:
    estimates = {name: {method: estimate(name, method) for method in METHODS} for name in FAMILIES}
    print(json.dumps({"machine": machine(), "gib": estimates}, indent=2))


if __name__ == "__main__":
    main()
