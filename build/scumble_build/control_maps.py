"""Pictures → control maps, without any model. `pixels` and maps are `(H, W, 3)` uint8, RGB.

Maps look as in the nets' training data: white lines on black. Maps that need a model (depth, poses, …) are not made
here; a request sends them ready-made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from scumble.errors import InvalidRequest

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

_Threshold = Annotated[int, Field(ge=0, le=1000)]
_Sigma = Annotated[float, Field(gt=0, le=64)]


class _Preprocessor(BaseModel, ABC):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @abstractmethod
    def apply(self, pixels: Pixels) -> Pixels: ...


class Canny(_Preprocessor):
    """Edges by Canny's method: starting above `high`, followed down to `low` (`cv2.Canny`)."""

    name: Literal["canny"] = "canny"
    low: _Threshold = 100
    high: _Threshold = 200

    def apply(self, pixels: Pixels) -> Pixels:
        return _grey(cv2.Canny(pixels, self.low, self.high))


class SoftEdge(_Preprocessor):
    """Gradient of brightness: Scharr's operator on the blurred picture, scaled so that the steepest 2 % are white."""

    name: Literal["soft_edge"] = "soft_edge"
    sigma: _Sigma = 1.5

    def apply(self, pixels: Pixels) -> Pixels:
        light = _blur(_luminance(pixels), self.sigma)
        steepness = cv2.magnitude(cv2.Scharr(light, cv2.CV_32F, 1, 0), cv2.Scharr(light, cv2.CV_32F, 0, 1))
        return _grey(steepness * (255 / max(float(np.percentile(steepness, 98)), 1.0)))


class LineArt(_Preprocessor):
    """Dark lines: how much darker a pixel is than its surroundings (controlnet_aux's LineartStandard)."""

    name: Literal["line_art"] = "line_art"
    sigma: _Sigma = 6.0
    threshold: Annotated[float, Field(ge=0, le=255)] = 8.0

    def apply(self, pixels: Pixels) -> Pixels:
        darker = _surroundings_minus(pixels, self.sigma, pixels.astype(np.float32)).clip(0, 255)
        lines = darker[darker > self.threshold]
        usual = max(16.0, float(np.median(lines))) if lines.size else 16.0
        return _grey(darker * (127 / usual))


class Scribble(_Preprocessor):
    """Thick strokes along edges: where two blurs differ (XDoG; Winnemöller et al., 2012)."""

    name: Literal["scribble"] = "scribble"
    threshold: Annotated[float, Field(ge=1, le=64)] = 32.0

    def apply(self, pixels: Pixels) -> Pixels:
        darker = _surroundings_minus(pixels, 5.0, _blur(pixels, 0.5)).clip(0, 255)
        return _grey(np.where(2 * darker > self.threshold, 255, 0))


class Tile(_Preprocessor):
    """Less detail: scaled down by `factor` and up again, then blurred with `sigma` (0: no blur)."""

    name: Literal["tile"] = "tile"
    factor: Annotated[float, Field(ge=1, le=32)] = 2.0
    sigma: Annotated[float, Field(ge=0, le=64)] = 0.0

    def apply(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        small = (max(1, round(width / self.factor)), max(1, round(height / self.factor)))
        coarse = cv2.resize(cv2.resize(pixels, small, interpolation=cv2.INTER_AREA), (width, height))
        return _rounded(_blur(coarse, self.sigma) if self.sigma else coarse)


class Recolour(_Preprocessor):
    """The picture without its colours: lightness (L of CIE Lab) or intensity (V of HSV), to the power `gamma`."""

    name: Literal["recolour"] = "recolour"
    by: Literal["luminance", "intensity"] = "luminance"
    gamma: Annotated[float, Field(ge=0.1, le=4)] = 1.0

    def apply(self, pixels: Pixels) -> Pixels:
        if self.by == "luminance":
            grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)[..., 0]
        else:
            grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[..., 2]
        return _grey((grey.astype(np.float32) / 255) ** self.gamma * 255)


class Invert(_Preprocessor):
    """Black on white becomes white on black: for drawings."""

    name: Literal["invert"] = "invert"

    def apply(self, pixels: Pixels) -> Pixels:
        return np.invert(pixels)


Preprocessor = Canny | SoftEdge | LineArt | Scribble | Tile | Recolour | Invert
_PREPROCESSORS: TypeAdapter[Preprocessor] = TypeAdapter(Annotated[Preprocessor, Field(discriminator="name")])
NAMES = ("canny", "soft_edge", "line_art", "scribble", "tile", "recolour", "invert")


def parse(asked: str | dict[str, Any]) -> Preprocessor:
    """Parse `canny` or `{"name": "canny", "low": 50}`. Raises InvalidRequest for an unknown name or parameter."""
    given = {"name": asked} if isinstance(asked, str) else asked
    if given.get("name") not in NAMES:
        raise InvalidRequest(
            f"there is no preprocessor {given.get('name')!r}; there are {', '.join(NAMES)}. "
            "Maps that need a model are sent ready-made, without preprocess",
            field="adapters.preprocess",
        )
    try:
        return _PREPROCESSORS.validate_python(given)
    except ValidationError as error:
        problems = "; ".join(f"{item['loc'][-1]}: {item['msg']}" for item in error.errors())
        known = ", ".join(sorted(_parameters(str(given["name"])))) or "none"
        raise InvalidRequest(
            f"preprocess {given['name']}: {problems}; its parameters are {known}", field="adapters.preprocess"
        ) from error


def control_map(pixels: Pixels, width: int, height: int, preprocessor: Preprocessor | None) -> Pixels:
    """Resize a picture to the request's size (Lanczos, as diffusers' image processor does), then preprocess it."""
    if pixels.shape[:2] != (height, width):
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    return pixels if preprocessor is None else preprocessor.apply(np.ascontiguousarray(pixels))


def _parameters(name: str) -> set[str]:
    kinds: tuple[type[_Preprocessor], ...] = (Canny, SoftEdge, LineArt, Scribble, Tile, Recolour, Invert)
    (kind,) = (kind for kind in kinds if kind.model_fields["name"].default == name)
    return set(kind.model_fields) - {"name"}


def _surroundings_minus(pixels: Pixels, sigma: float, places: Floats) -> Floats:
    """Return `(H, W)`: how much lighter the surroundings are than `places`, the least over the three colours."""
    return np.asarray((_blur(pixels, sigma) - places).min(axis=2))


def _blur(pixels: NDArray[Any], sigma: float) -> Floats:
    return np.asarray(cv2.GaussianBlur(pixels.astype(np.float32), (0, 0), sigma))


def _luminance(pixels: Pixels) -> Pixels:
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))


def _rounded(values: NDArray[Any]) -> Pixels:
    return values.round().clip(0, 255).astype(np.uint8)


def _grey(values: NDArray[Any]) -> Pixels:
    """Round `(H, W)` to uint8 and repeat it over three channels: `(H, W, 3)`."""
    return np.repeat(_rounded(values)[..., None], 3, axis=2)
