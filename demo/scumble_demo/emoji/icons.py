"""Reads one icon set in Iconify's JSON format: https://iconify.design/docs/types/iconify-json.html."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scumble.errors import NotFound


@dataclass(frozen=True, slots=True)
class IconSet:
    """The icons of one package. `codes` maps a code point in hex ("1f34e") to an icon's name."""

    icons: dict[str, dict[str, Any]]
    aliases: dict[str, dict[str, Any]]
    codes: dict[str, str]
    width: int
    height: int

    def svg(self, name: str) -> str:
        """Return an icon as an SVG document."""
        icon = self._resolve(name)
        left, top = icon.get("left", 0), icon.get("top", 0)
        box = f"{left} {top} {icon.get('width', self.width)} {icon.get('height', self.height)}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}">{icon["body"]}</svg>'
        )

    def svg_of_code(self, code: str) -> str:
        """Return the icon of a Unicode code point. Raises NotFound if the set does not have it."""
        name = self.codes.get(code) or self.codes.get(f"{code}-fe0f")
        if name is None:
            raise NotFound(f"the icon set has no picture of code point {code}", code=code)
        return self.svg(name)

    def _resolve(self, name: str) -> dict[str, Any]:
        if name in self.icons:
            return self.icons[name]
        alias = self.aliases.get(name)
        if alias is None:
            raise NotFound(f"the icon set has no icon {name!r}", name=name)
        return self._resolve(str(alias["parent"])) | {k: v for k, v in alias.items() if k != "parent"}


def read_icon_set(folder: Path) -> IconSet:
    """Read `icons.json` and `chars.json` of an unpacked package."""
    data = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    codes = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    width = int(data.get("width", 16))
    return IconSet(data["icons"], data.get("aliases", {}), codes, width, int(data.get("height", width)))
