"""ControlNet with its text's keys and values, and its embedded control picture, as inputs (Zhang et al., 2302.05543).

Neither depends on the time step: `project` and `embed` run once per request, `residuals` at every step. The layers are
those of diffusers' ControlNetModel and ControlNetUnionModel; this module only calls them in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from torch import Tensor, nn

from scumble_build.graphs.denoiser import CrossAttention, KVProjection, StepInput, cross_attentions
from scumble_build.graphs.inputs import NetInputs, StepInputs


class ControlledEncoder(nn.Module):
    """The encoder of both kinds of ControlNet, whose cross-attention reads K and V from the input."""

    def __init__(self, model: ControlNetModel | ControlNetUnionModel) -> None:
        super().__init__()
        self.model = model
        self.projection = KVProjection(model)
        self.input = StepInput()
        slices = {kv_slice.name: kv_slice for kv_slice in self.projection.slices}
        for name, attention in cross_attentions(model):
            attention.set_processor(CrossAttention(slices[name], 0, self.input))
        self.pools = bool(model.config.global_pool_conditions)

    def project(self, states: Tensor) -> Tensor:
        """Project text states `(rows, T, C)` to the net's own keys and values `(rows, T, K)`."""
        kv: Tensor = self.projection(states)
        return kv

    def embed(self, control: Tensor) -> Tensor:
        """Embed control pictures `(n, 3, H, W)`, RGB in 0…1, as `(n, C, H/8, W/8)`."""
        if self.model.config.controlnet_conditioning_channel_order == "bgr":
            control = control.flip(1)
        hint: Tensor = self.model.controlnet_cond_embedding(control)
        return hint

    def condition(self, pooled: Tensor, sizes: Tensor) -> Tensor | None:
        """Embed pooled text `(rows, P)` and sizes `(rows, 6)` as `(rows, E)`; None for a net without them (all but
        SDXL).
        """
        if self.model.config.addition_embed_type != "text_time":
            return None
        spread = self.model.add_time_proj(sizes.flatten()).view(sizes.shape[0], -1)
        added: Tensor = self.model.add_embedding(torch.cat([pooled, spread.to(pooled)], dim=-1))
        return added

    def time(self, timestep: Tensor, dtype: torch.dtype, added: Tensor | None) -> Tensor:
        """Embed timestep `(rows,)` as `(rows, E)` and add `added` `(rows, E)`, if given."""
        embedded: Tensor = self.model.time_embedding(self.model.time_proj(timestep).to(dtype))
        return embedded if added is None else embedded + added

    def encode(self, sample: Tensor, time: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        """Run the encoder on sample `(rows, 4, h, w)` and time `(rows, E)`.

        Returns unscaled residuals `(rows, C, h', w')`, one per skip connection and the middle block's last.
        """
        self.input.inputs = StepInputs(inputs.kv, inputs.kv_mask)
        sample = self.model.conv_in(sample) + inputs.hint
        skips = [sample]
        for block in self.model.down_blocks:
            sample, outputs = block(hidden_states=sample, temb=time)
            skips += outputs
        sample = self.model.mid_block(sample, time)
        convolutions = (*self.model.controlnet_down_blocks, self.model.controlnet_mid_block)
        residuals = [layer(skip) for layer, skip in zip(convolutions, [*skips, sample], strict=True)]
        if self.pools:
            residuals = [map_.mean((2, 3), keepdim=True).expand_as(map_) for map_ in residuals]
        return tuple(residuals)


class ControlNet(ControlledEncoder):
    """A net for one kind of control."""

    def residuals(self, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        """Return `encode`'s residuals for sample `(rows, 4, h, w)` and timestep `(rows,)`."""
        return self.encode(sample, self.time(timestep, sample.dtype, inputs.added), inputs)


class ControlNetUnion(ControlledEncoder):
    """A net for several kinds of control (ControlNet++, xinsir; diffusers' ControlNetUnionModel).

    Its transformer mixes the pictures by their means. diffusers (and the original) pass it rows × tokens where torch
    expects tokens × rows, so a picture's token attends to the same token of the batch's other rows. In a request that
    runs alone these are equal, and attention among equal tokens returns each its own value. So here each token attends
    only to itself: the same result as diffusers' for a request alone, whoever shares the batch. As no token sees the
    sample, pictures are fused once per request.
    """

    def fuse(self, controls: Tensor, types: Sequence[int], weights: Sequence[float]) -> Tensor:
        """Fuse controls `(n, 3, H, W)`, each with its kind of control and its weight, into a hint `(1, C, h, w)`.

        A single picture's weight is 1 here: it is applied to the residuals instead.
        """
        return self.fused(controls, torch.tensor(types, device=controls.device), controls.new_tensor(weights))

    def fused(self, controls: Tensor, kinds: Tensor, weights: Tensor) -> Tensor:
        """Do the same with kinds and weights `(n,)` as tensors."""
        hints, weight = self.embed(controls), weights[:, None]
        tokens = (hints.mean((2, 3)) + self.model.task_embedding.index_select(0, kinds)) * weight
        for layer in self.model.transformer_layes:  # the model's own spelling
            tokens = layer(tokens[None])[0]
        shifted = hints + self.model.spatial_ch_projs(tokens)[..., None, None]
        # With its dtype given, as an exported sum would be float32 otherwise.
        hint: Tensor = (shifted * weight[..., None, None]).sum(0, keepdim=True, dtype=shifted.dtype)
        return hint

    def residuals_of(self, types: Tensor, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        """Return residuals as ControlNet.residuals does; `types` is `present` of the kinds of all rows' pictures."""
        time = self.time(timestep, sample.dtype, inputs.added) + self._type_embedding(types, sample)
        return self.encode(sample, time, inputs)

    def present(self, types: Sequence[int]) -> Tensor:
        """Return the kinds of control as `residuals_of` takes them: `(kinds,)`, 1 for each one present, else 0."""
        flags = [float(kind in types) for kind in range(self.model.config.num_control_type)]
        return torch.tensor(flags, device=self.model.device)

    def _type_embedding(self, types: Tensor, like: Tensor) -> Tensor:
        """Embed the kinds present as `(1, E)`."""
        spread = self.model.control_type_proj(types).view(1, -1)
        embedded: Tensor = self.model.control_add_embedding(spread.to(like.dtype))
        return embedded
