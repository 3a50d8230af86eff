"""The LoRAs that hypernetworks predict: run once for a predictor and what it looks at, then kept like any record.

A predictor reads a picture through the base's image encoder, or a text through the base's text encoder. Neither is
changed by the request's other adapters: what is predicted depends on the predictor and its condition alone.
"""

from __future__ import annotations

from collections.abc import Hashable
from math import prod

import torch
from torch import Tensor

from scumble.errors import Incompatible, InvalidRequest, Refused
from scumble_build.graphs.predictor import PredictedFactors, Predictor
from scumble_build.graphs.text import TextInputs
from scumble_registry.compatibility import HypernetworkCompatibility, LoraCompatibility, WeightPredictor
from scumble_registry.formats.hypernetwork import read_record
from scumble_registry.formats.hypernetwork.predictor import PredictorRecord
from scumble_registry.formats.lora import LoraModule, LoraRecord
from scumble_server.base import Base
from scumble_server.methods.context import Context
from scumble_server.methods.image_encoders import encode, encoder_in_base
from scumble_server.methods.method import Lora
from scumble_server.prompts.tokens import tokenize
from scumble_server.request.adapter import ResolvedAdapter

_ENCODERS = {"image": "image_encoder", "text": "text_encoder"}


def predictor_of(adapter: ResolvedAdapter) -> WeightPredictor | None:
    """None for what predicts nothing."""
    compatibility = adapter.version.manifest.compatibility
    if not isinstance(compatibility, HypernetworkCompatibility):
        return None
    return compatibility.network if isinstance(compatibility.network, WeightPredictor) else None


def check(adapter: ResolvedAdapter, predictor: WeightPredictor, base: Base) -> None:
    """It must have what it reads, and the base the encoder that it reads it through.

    Raises InvalidRequest, Refused or Incompatible.
    """
    ref = adapter.spec.ref
    if adapter.tensors:
        raise InvalidRequest(
            f"{ref} reads no tensors; leave {next(iter(adapter.tensors))!r} out", field="adapters.images"
        )
    if predictor.condition == "image":
        if adapter.spec.text is not None:
            raise InvalidRequest(f"{ref} reads a picture, not a text; leave text out", field="adapters.text")
        if len(adapter.pictures) != 1:
            raise InvalidRequest(
                f"{ref} predicts a LoRA from one picture, {len(adapter.pictures)} were named: send one in images and "
                "name it in the adapter's",
                field="adapters.images",
            )
        _check_image_encoder(adapter, predictor, base)
    elif adapter.pictures:
        raise InvalidRequest(f"{ref} reads a text, not pictures; leave images out", field="adapters.images")
    elif adapter.spec.text is not None and len(tokenize(base.tokenizers[0], adapter.spec.text).ids) > 1:
        most = base.tokenizers[0].model_max_length - 2
        raise InvalidRequest(f"{ref}: text has more than {most} tokens; shorten it", field="adapters.text")
    _check_digest(adapter, predictor, base)


def predicted_lora(adapter: ResolvedAdapter, predictor: WeightPredictor) -> Lora:
    """The LoRA for what the request shows; predicted once for all who show the same."""

    def condition(context: Context) -> Hashable:
        if predictor.condition == "image":
            return context.base.version.digest, adapter.pictures[0].digest
        return context.base.version.digest, tuple(_ids(context, adapter).flatten().tolist())

    def read(context: Context) -> LoraRecord:
        key = ("predicted", adapter.version.digest, condition(context))
        return context.records.get(key, _nbytes(predictor.lora), lambda: _predict(context, adapter))

    return Lora(adapter, predictor.lora, read, condition)


def _predict(context: Context, adapter: ResolvedAdapter) -> LoraRecord:
    """Raises Refused if the network gives no finite numbers."""
    with torch.inference_mode():
        factors = _network(context, adapter).predict(_condition(context, adapter).float())
    if not all(torch.isfinite(down).all() and torch.isfinite(up).all() for down, up, _ in factors.values()):
        raise Refused(
            f"{adapter.version.ref} predicts NaN or infinite values for this condition; use another, or another "
            "version",
            ref=adapter.spec.ref,
        )
    return _as_record(factors)


def _condition(context: Context, adapter: ResolvedAdapter) -> Tensor:
    """States (1, N, C)."""
    if adapter.pictures:
        return encode(context, encoder_in_base(context), adapter.pictures[0]).states
    return context.base_weights.executor.encode(0, TextInputs(_ids(context, adapter))).states


def _ids(context: Context, adapter: ResolvedAdapter) -> Tensor:
    """`(1, 77)` of the text, or of the beginning of the prompt as it is written."""
    text = context.settings.prompt if adapter.spec.text is None else adapter.spec.text
    return tokenize(context.base.tokenizers[0], text).ids[:1]


def _network(context: Context, adapter: ResolvedAdapter) -> Predictor:
    stored = context.record(adapter, read_record)
    assert isinstance(stored, PredictorRecord)
    return context.device.get(
        ("predictor", adapter.version.digest),
        stored.values * 4,
        lambda: Predictor.of(stored).to(context.executor.device),
    )


def _as_record(factors: PredictedFactors) -> LoraRecord:
    return {
        target: LoraModule(down.cpu().numpy(), up.cpu().numpy(), alpha)
        for target, (down, up, alpha) in sorted(factors.items())
    }


def _nbytes(lora: LoraCompatibility) -> int:
    return sum((shape[0] + prod(shape[1:])) * lora.ranks[name] * 4 for name, shape in lora.requires.items())


def _check_image_encoder(adapter: ResolvedAdapter, predictor: WeightPredictor, base: Base) -> None:
    if base.image_encoder is None:
        raise Refused(
            f"{adapter.version.ref} reads pictures through the base's image encoder, but {base.version.ref} has none; "
            "use the base that it was trained on",
            ref=adapter.spec.ref,
        )
    if base.image_encoder.hidden_size != predictor.condition_width:
        raise Incompatible(
            f"{adapter.version.ref} reads pictures at width {predictor.condition_width}, but the image encoder of "
            f"{base.version.ref} gives {base.image_encoder.hidden_size}; use the base that it was trained on",
            adapter_width=predictor.condition_width,
            encoder_width=base.image_encoder.hidden_size,
        )


def _check_digest(adapter: ResolvedAdapter, predictor: WeightPredictor, base: Base) -> None:
    folder = _ENCODERS[predictor.condition]
    digests = {
        blob.digest
        for name, blob in base.version.manifest.files.items()
        if name.startswith(f"{folder}/") and name.endswith(".safetensors")
    }
    if predictor.encoder is not None and predictor.encoder not in digests:
        raise Incompatible(
            f"{adapter.version.ref} was trained with another {folder.replace('_', ' ')} than that of "
            f"{base.version.ref}; use the base that it was trained on",
            adapter_encoder=predictor.encoder,
            base_encoder=sorted(digests),
        )
