"""What others would do with guided images that have a LoRA each: diffusers, one image after another or in one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]


class Diffusers:
    """diffusers' UNet with LoRAs of one rank. `step(rows)` is one call of it for that many rows."""

    def __init__(self, unet: Any, rank: int, count: int, step: Callable[[Any, int], object]) -> None:
        self._unet, self._rank, self._step = unet, rank, step
        self._names = [f"a{index}" for index in range(count)]
        self._states: list[dict[str, Any]] = []

    def load(self) -> None:
        """All adapters side by side, as PEFT has them."""
        config = LoraConfig(r=self._rank, target_modules=TARGETS, init_lora_weights=False)
        for name in self._names:
            self._unet.add_adapter(config, name)
            state = get_peft_model_state_dict(self._unet, adapter_name=name)
            self._states.append({key: values.clone() for key, values in state.items()})
        like = next(self._unet.parameters())
        self._unet.to(like.device, self._unet.dtype)

    def one_after_another(self, steps: int, decode: Callable[[], object]) -> None:
        for name in self._names:
            self._unet.set_adapters(name)
            for _ in range(steps):
                self._step(self._unet, 2)
            decode()

    def one_shared(self, steps: int, decode: Callable[[], object]) -> None:
        """The limit: all images in one batch with the same LoRA, which is not what was asked for."""
        self._unet.set_adapters(self._names[0])
        for _ in range(steps):
            self._step(self._unet, 2 * len(self._names))
        for _ in self._names:
            decode()

    def compile(self) -> None:
        """Compile with one adapter, whose weights can be swapped without compiling again. Others are gone."""
        self._unet.delete_adapters(self._names)
        self._unet.enable_lora_hotswap(target_rank=self._rank)
        self._unet.load_lora_adapter(self._states[0], prefix=None, adapter_name="swapped")
        # Without Inductor on a CPU, where only the script is tested.
        on_gpu = next(self._unet.parameters()).device.type == "cuda"
        self._unet.compile(backend="inductor" if on_gpu else "eager")

    def hot_swapped(self, steps: int, decode: Callable[[], object]) -> None:
        """As an expert would do it. Call `compile` before."""
        for state in self._states:
            self._unet.load_lora_adapter(state, prefix=None, adapter_name="swapped", hotswap=True)
            for _ in range(steps):
                self._step(self._unet, 2)
            decode()
