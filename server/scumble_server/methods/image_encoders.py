"""Which image encoder an IP-Adapter reads its pictures with, and what that makes of them.

It is the one in the adapter's own entry; or the one that was named when the adapter was published; or else the base's
own `image_encoder/`, if that gives what the adapter reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from scumble.errors import Incompatible, Refused
from scumble_build.graphs.loading import loading
from scumble_build.graphs.vision import PREPARATION, EncodedPictures, ImageEncoder
from scumble_registry import Version
from scumble_registry.compatibility import ImageEncoderCompatibility, IpAdapterCompatibility
from scumble_registry.formats.safetensors_header import read_header
from scumble_server.base import Base
from scumble_server.methods.context import Context
from scumble_server.request.adapter import ResolvedAdapter
from scumble_server.request.pictures import Picture

_FOLDER = "image_encoder"
_BASES_PREPARATION = "feature_extractor"  # where diffusers keeps it


@dataclass(frozen=True, slots=True)
class ImageEncoderLocation:
    """An image encoder on disk. `preparation` is the folder with preprocessor_config.json."""

    version: Version
    part: str
    """Its folder in the version; empty where it is the whole version."""
    folder: Path
    preparation: Path | None
    compatibility: ImageEncoderCompatibility

    @property
    def key(self) -> tuple[str, str]:
        """The name of its content."""
        return self.version.digest, self.part

    @property
    def positions(self) -> int:
        """How many states a picture has."""
        return (self.compatibility.image_size // self.compatibility.patch_size) ** 2 + 1


def check(adapter: ResolvedAdapter, base: Base) -> None:
    """Raises Refused if no image encoder is there for an adapter that reads pictures."""
    reads = _compatibility(adapter)
    if reads.picture_width is None or reads.encoder is not None or adapter.version.manifest.image_encoder:
        return
    help_ = "publish it again with --image-encoder REF, or as a folder with image_encoder/ beside the file"
    if base.image_encoder is None:
        raise Refused(
            f"{adapter.version.ref} comes without an image encoder, and so does the base {base.version.ref}; {help_}",
            ref=adapter.spec.ref,
        )
    try:
        reads.check_encoder(base.image_encoder)
    except Incompatible as error:
        raise Incompatible(
            f"{adapter.version.ref} comes without an image encoder, and that of the base {base.version.ref} does not "
            f"fit ({error.message}); {help_}",
            **error.fields,
        ) from error


def source_of(adapter: ResolvedAdapter) -> str | None:
    """For the receipt: `entry`, `base`, or the digest of what was named; None where pictures are not read."""
    if _compatibility(adapter).picture_width is None:
        return None
    return "entry" if _compatibility(adapter).encoder is not None else adapter.version.manifest.image_encoder or "base"


def encoder_of(context: Context, adapter: ResolvedAdapter) -> ImageEncoderLocation:
    """Raises NotFound or Refused if the named version is gone or quarantined, IntegrityError, Unavailable."""
    registry, reads, named = context.registry, _compatibility(adapter), adapter.version.manifest.image_encoder
    if reads.encoder is not None:
        folder = registry.materialise(adapter.version) / _FOLDER
        return ImageEncoderLocation(adapter.version, _FOLDER, folder, _with_preparation(folder), reads.encoder)
    if named is not None:
        version = registry.resolve_digest(named)
        assert isinstance(version.manifest.compatibility, ImageEncoderCompatibility)
        folder = registry.materialise(version)
        return ImageEncoderLocation(version, "", folder, _with_preparation(folder), version.manifest.compatibility)
    return encoder_in_base(context)


def encoder_in_base(context: Context) -> ImageEncoderLocation:
    """The base's own, which is there: whoever asks has checked. Raises IntegrityError or Unavailable."""
    base = context.base
    assert base.image_encoder is not None
    root = context.registry.materialise(base.version)
    preparation = _with_preparation(root / _FOLDER, root / _BASES_PREPARATION)
    return ImageEncoderLocation(base.version, _FOLDER, root / _FOLDER, preparation, base.image_encoder)


def encode(context: Context, location: ImageEncoderLocation, picture: Picture | None) -> EncodedPictures:
    """Encode one picture, or none at all; once for all who look at it."""
    sizes = location.compatibility
    values = sizes.projection_dim + location.positions * sizes.hidden_size
    key = ("picture", location.key, picture.digest if picture is not None else None)

    def make() -> EncodedPictures:
        encoder = _load(context, location)
        return encoder.encode([picture.on_white]) if picture is not None else encoder.encode_nothing()

    return context.device.get(key, values * context.executor.dtype.itemsize, make)


def _load(context: Context, location: ImageEncoderLocation) -> ImageEncoder:
    dtype = context.executor.dtype
    header = read_header(location.folder / "model.safetensors")
    nbytes = sum(prod(info.shape) for info in header.tensors.values()) * dtype.itemsize

    def load() -> ImageEncoder:
        with loading(location.version.ref, location.version.digest, location.part):
            return ImageEncoder(location.folder, location.preparation, context.executor.device, dtype)

    return context.device.get(("image_encoder", location.key), nbytes, load)


def _with_preparation(*folders: Path) -> Path | None:
    return next((folder for folder in folders if (folder / PREPARATION).is_file()), None)


def _compatibility(adapter: ResolvedAdapter) -> IpAdapterCompatibility:
    compatibility = adapter.version.manifest.compatibility
    assert isinstance(compatibility, IpAdapterCompatibility)
    return compatibility
