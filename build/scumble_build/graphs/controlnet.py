"""ControlNet with its text's keys and values, and its embedded control picture, as inputs (Zhang et al., 2302.05543).

Neither depends on the time step: `project` and `embed` run once per request, `residuals` at every step. The layers are
those of diffusers' ControlNetModel and ControlNetUnionModel; only the order of the calls stands here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from torch import Tensor, nn

from scumble_build.graphs.denoiser import CrossAttention, KVProjection, StepInput, cross_attentions
from scumble_build.graphs.inputs import NetInputs, StepInputs


class ControlledEncoder(nn.Module):
    """What ControlNets of both kinds share: the encoder, whose cross-attention reads K and V from the input."""

    def __init__(self, model: ControlNetModel | ControlNetUnionModel) -> None:
        super().__init__()
        self.model = model
        self.projection = KVProjection(model)
        self.input = StepInput()
        places = {place.name: place for place in self.projection.slices}
        for name, attention in cross_attentions(model):
            attention.set_processor(CrossAttention(places[name], 0, self.input))
        self.pools = bool(model.config.global_pool_conditions)

    def project(self, states: Tensor) -> Tensor:
        """Text states `(rows, T, C)` → the net's own keys and values `(rows, T, K)`."""
        kv: Tensor = self.projection(states)
        return kv

    def embed(self, control: Tensor) -> Tensor:
        """Control pictures `(n, 3, H, W)`, RGB in 0…1 → `(n, C, H/8, W/8)`."""
        if self.model.config.controlnet_conditioning_channel_order == "bgr":
            control = control.flip(1)
        hint: Tensor = self.model.controlnet_cond_embedding(control)
        return hint

    def condition(self, pooled: Tensor, sizes: Tensor) -> Tensor | None:
        """Pooled text `(rows, P)` and sizes `(rows, 6)` → `(rows, E)`, or None if the net reads neither (SDXL's do)."""
        if self.model.config.addition_embed_type != "text_time":
            return None
        spread = self.model.add_time_proj(sizes.flatten()).view(sizes.shape[0], -1)
        added: Tensor = self.model.add_embedding(torch.cat([pooled, spread.to(pooled)], dim=-1))
        return added

    def time(self, timestep: Tensor, dtype: torch.dtype, added: Tensor | None) -> Tensor:
        """timestep `(rows,)`, added `(rows, E)` or None → `(rows, E)`."""
        embedded: Tensor = self.model.time_embedding(self.model.time_proj(timestep).to(dtype))
        return embedded if added is None else embedded + added

    def encode(self, sample: Tensor, time: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        """sample `(rows, 4, h, w)`, time `(rows, E)` → unscaled residuals `(rows, C, h', w')`, middle block last."""
        self.input.inputs = StepInputs(inputs.kv, inputs.kv_mask)
        sample = self.model.conv_in(sample) + inputs.hint
        skips = [sample]
        for block in self.model.down_blocks:
            sample, outputs = block(hidden_states=sample, temb=time)
            skips += outputs
        sample = self.model.mid_block(sample, time)
        convolutions = (*self.model.controlnet_down_blocks, self.model.controlnet_mid_block)
        residuals = [each(skip) for each, skip in zip(convolutions, [*skips, sample], strict=True)]
        if self.pools:
            residuals = [each.mean((2, 3), keepdim=True).expand_as(each) for each in residuals]
        return tuple(residuals)


class ControlNet(ControlledEncoder):
    """A net for one kind of control."""

    def residuals(self, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        """sample `(rows, 4, h, w)`, timestep `(rows,)` → for each skip connection, and at last the middle block,
        `(rows, C, h, w)`.
        """
        return self.encode(sample, self.time(timestep, sample.dtype, inputs.added), inputs)


class ControlNetUnion(ControlledEncoder):
    """A net for several kinds of control (ControlNet++, xinsir; diffusers' ControlNetUnionModel).

    Its transformer weighs the pictures by their means. diffusers (and the original) hand it rows × tokens where torch
    expects tokens × rows, so a picture's token attends to the same token of the batch's other rows. Within one request
    these are equal, and attention among equals gives each its own value. So it is written here: each token for
    itself, which is what diffusers computes for a request alone, whoever shares the batch; and as no token then sees
    the sample, pictures are fused once per request.
    """

    def fuse(self, controls: Tensor, types: Sequence[int], weights: Sequence[float]) -> Tensor:
        """controls `(n, 3, H, W)`, for each its kind of control and its weight → hint `(1, C, h, w)`.

        A single picture's weight has its place behind the net, on the residuals: it is 1 here.
        """
        return self.fused(controls, torch.tensor(types, device=controls.device), controls.new_tensor(weights))

    def fused(self, controls: Tensor, kinds: Tensor, weights: Tensor) -> Tensor:
        """The same with kinds and weights `(n,)` as tensors."""
        hints, weight = self.embed(controls), weights[:, None]
        tokens = (hints.mean((2, 3)) + self.model.task_embedding.index_select(0, kinds)) * weight
        for layer in self.model.transformer_layes:  # the model's own spelling
            tokens = layer(tokens[None])[0]
        shifted = hints + self.model.spatial_ch_projs(tokens)[..., None, None]
        # The type is said, for an exported sum would else be of float32.
        hint: Tensor = (shifted * weight[..., None, None]).sum(0, keepdim=True, dtype=shifted.dtype)
        return hint

    def residuals_of(self, types: Tensor, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        """As ControlNet.residuals; `types` is what `present` says of the kinds of control of all rows' pictures."""
        time = self.time(timestep, sample.dtype, inputs.added) + self._type_embedding(types, sample)
        return self.encode(sample, time, inputs)

    def present(self, types: Sequence[int]) -> Tensor:
        """What `residuals_of` takes for these kinds of control."""
        found = torch.zeros(self.model.config.num_control_type, device=self.model.device)
        found[list(types)] = 1
        return found

    def _type_embedding(self, types: Tensor, like: Tensor) -> Tensor:
        """`(1, E)`"""
        spread = self.model.control_type_proj(types).view(1, -1)
        embedded: Tensor = self.model.control_add_embedding(spread.to(like.dtype))
        return embedded
