"""The record of an IP-Adapter, made from every layout and read by the server.

A canonical safetensors file, dtypes as published:

    image_proj.<name>           the projection of images into tokens, by the names of `projection.py`
    <attention>.to_k_ip         (width, X)   for every cross-attention of the base, by canonical name
    <attention>.to_v_ip         (width, X)
    <target>.down, .up, .alpha  FaceID's LoRA, if there is one, as in a LoRA's record

Laws: `read_record(write_record(r)) == r` bit for bit, and equal records have equal bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scumble.errors import IntegrityError, Refused
from scumble_registry.formats.lora.record import LoraModule, make_module
from scumble_registry.formats.safetensors_header import Array, Unwritten, read_header, read_tensors

_METADATA = {"format": "scumble.ip_adapter.1"}
_PROJECTION, _KEY, _VALUE, _ALPHA = "image_proj.", ".to_k_ip", ".to_v_ip", ".alpha"


@dataclass(frozen=True, slots=True, eq=False)
class IpAdapterRecord:
    """An IP-Adapter's tensors; X is the width of the image's tokens."""

    projection: dict[str, Array]
    """Name in `image_proj` → tensor, sorted."""
    keys: dict[str, Array]
    """Canonical name of a cross-attention → (width, X), sorted."""
    values: dict[str, Array]
    """The same attentions → (width, X), sorted."""
    lora: dict[str, LoraModule] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of parameters without the LoRA."""
        return sum(a.size for a in (*self.projection.values(), *self.keys.values(), *self.values.values()))


def write_record(record: IpAdapterRecord) -> bytes:
    return b"".join(unwritten(record).chunks())


def unwritten(record: IpAdapterRecord) -> Unwritten:
    """Return the record's content, to be written tensor by tensor."""
    tensors = {_PROJECTION + name: values for name, values in record.projection.items()}
    tensors |= {name + _KEY: values for name, values in record.keys.items()}
    tensors |= {name + _VALUE: values for name, values in record.values.items()}
    for target, module in record.lora.items():
        tensors[f"{target}.down"], tensors[f"{target}.up"] = module.down, module.up
        tensors[target + _ALPHA] = np.array(module.alpha, dtype="<f4")
    return Unwritten(tensors, _METADATA)


def read_record(path: Path) -> IpAdapterRecord:
    """Read a record as read-only views of the mapped file. Raises IntegrityError if this is no record."""
    try:
        header = read_header(path)
        if header.metadata != _METADATA:
            raise Refused(f"its metadata is {header.metadata}, not {_METADATA}")
        tensors = dict(sorted(read_tensors(path, header).items()))
        record = IpAdapterRecord(
            projection=_select(tensors, _PROJECTION, ""),
            keys=_select(tensors, "unet.", _KEY, keep_start=True),
            values=_select(tensors, "unet.", _VALUE, keep_start=True),
            lora=_lora(tensors),
        )
        known = len(record.projection) + 2 * len(record.keys) + 3 * len(record.lora)
        if record.keys.keys() != record.values.keys() or known != len(tensors):
            raise Refused("it has unknown tensors")
        return record
    except (Refused, KeyError) as error:
        raise IntegrityError(f"{path} is not an IP-Adapter's record: {error}; clear the cache and try again") from error


def _select(tensors: dict[str, Array], start: str, end: str, *, keep_start: bool = False) -> dict[str, Array]:
    """Return the tensors whose name has this start and end, by the name without them."""
    skip = 0 if keep_start else len(start)
    return {
        name[skip : len(name) - len(end)]: values
        for name, values in tensors.items()
        if name.startswith(start) and name.endswith(end)
    }


def _lora(tensors: dict[str, Array]) -> dict[str, LoraModule]:
    targets = [name.removesuffix(_ALPHA) for name in tensors if name.startswith("unet.") and name.endswith(_ALPHA)]
    return {
        target: make_module(target, tensors[f"{target}.down"], tensors[f"{target}.up"], float(tensors[target + _ALPHA]))
        for target in targets
    }
