"""ControlNet-LLLite: small networks on the inputs of attention's projections (kohya-ss, control_net_lllite).

For each matrix W whose input it changes, by its original name with `_` for `.`:

    lllite_unet_<module>.conditioning1.{0,2[,4]}   convolutions: control image (-1…1) → embedding of each position (e)
    lllite_unet_<module>.down.0                    (d, in)
    lllite_unet_<module>.mid.0                     (d, d + e)
    lllite_unet_<module>.up.0                      (in, d)

    input of W = x + weight · up(relu(mid([embedding, relu(down(x))])))

The stride of each convolution equals its kernel size, so the kernels determine how often the image is halved.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from scumble.errors import Refused
from scumble_registry.compatibility import Shape
from scumble_registry.compatibility.targets import LLLITE

_KEY = re.compile(rf"({LLLITE}\w+)\.(conditioning1\.[024]|down\.0|mid\.0|up\.0)\.(weight|bias)")


def is_lllite(names: Iterable[str]) -> bool:
    return any(_KEY.fullmatch(name) for name in names)


def unknown_keys(names: Iterable[str]) -> set[str]:
    return {name for name in names if not _KEY.fullmatch(name)}


def parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return module → tensor's name in it (`down.0.weight`) → its name in the file."""
    by_module: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _KEY.fullmatch(name):
            by_module.setdefault(match[1], {})[f"{match[2]}.{match[3]}"] = name
    return by_module


def modules(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return module → width of its input. Raises Refused where tensors are missing or do not fit."""
    return {
        module: _width(module, {own: shapes[name] for own, name in names.items()})
        for module, names in sorted(parts(shapes).items())
    }


def _width(name: str, shapes: Mapping[str, Shape]) -> int:
    down, mid, up = (shapes.get(f"{part}.0.weight", ()) for part in ("down", "mid", "up"))
    last = shapes.get("conditioning1.4.weight", shapes.get("conditioning1.2.weight", ()))
    first = shapes.get("conditioning1.0.weight", ())
    biases = {key.replace(".weight", ".bias") for key in shapes if key.endswith(".weight")}
    if len(down) != 2 or len(first) != 4 or len(last) != 4 or biases - shapes.keys():
        raise Refused(f"{name} is incomplete, or changes a convolution; only matrices can be served", tensor=name)
    inner, width = down
    expected = {"mid": (inner, inner + last[0]), "up": (width, inner)}
    if {"mid": mid, "up": up} != expected or first[1] != 3:
        raise Refused(f"{name} has mid {mid} and up {up}; {expected} would fit its down {down}", tensor=name)
    return width
