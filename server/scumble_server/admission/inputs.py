"""The pictures and tensors that a request brings, decoded and checked at the edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from scumble.errors import InvalidRequest
from scumble.request import Options, Request
from scumble_server.request.original import Original, check
from scumble_server.request.pictures import Picture, decode_all

MAX_VALUE = 1e4
"""The largest number of an input tensor: encoders' outputs are below 100, and half precision ends at 65504."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """A request's pictures and tensors, by name, and the original that its images begin with."""

    pictures: Mapping[str, Picture]
    tensors: Mapping[str, NDArray[Any]]
    original: Original | None

    @classmethod
    def of(cls, request: Request, *, inpaints: bool) -> Inputs:
        """`inpaints`: the base reads a mask.

        Raises InvalidRequest for what cannot be read, for a name used twice, and for what nothing names.
        """
        check(request.options, inpaints=inpaints)
        if both := sorted(request.images.keys() & request.tensors.keys()):
            raise InvalidRequest(f"{both[0]!r} names a picture and a tensor; rename one of them", field="images")
        named = {name for adapter in request.adapters for name in (*adapter.images, *adapter.masks)}
        named |= {name for name in (request.options.image, request.options.mask) if name is not None}
        if unused := sorted((request.images.keys() | request.tensors.keys()) - named):
            raise InvalidRequest(
                f"{unused[0]!r} was sent, but nothing names it (images or masks of an adapter, options.image, "
                "options.mask); name it or leave it out",
                field=f"{'images' if unused[0] in request.images else 'tensors'}.{unused[0]}",
            )
        for name, values in request.tensors.items():
            if values.dtype.kind != "f" or not (abs(values) <= MAX_VALUE).all():
                raise InvalidRequest(
                    f"tensors.{name}: must hold finite floating point numbers between {-MAX_VALUE:g} and {MAX_VALUE:g}",
                    field=f"tensors.{name}",
                )
        inputs = cls(decode_all(request.images), request.tensors, None)
        return replace(inputs, original=inputs._original(request.options))

    def _original(self, options: Options) -> Original | None:
        if options.image is None:
            return None
        mask = None if options.mask is None else self.picture(options.mask, "options.mask")
        return Original(self.picture(options.image, "options.image"), mask)

    def picture(self, name: str, field: str) -> Picture:
        """The picture that `field` names. Raises InvalidRequest naming that field."""
        if name not in self.pictures:
            raise InvalidRequest(
                f"{field} names {name!r}, which the request does not bring; its pictures are "
                f"{sorted(self.pictures) or 'none'}, its tensors {sorted(self.tensors) or 'none'}",
                field=field,
            )
        return self.pictures[name]
