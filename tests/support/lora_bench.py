"""One service over tiny bases of three families, and diffusers' pipelines of the same folders as oracles."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline

from scumble.request import Adapter, Request
from scumble_registry import Registry, Version
from scumble_registry.compatibility import BaseCompatibility
from support.formats_table import note

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 2, "guidance_scale": 3.0, "width": 64, "height": 64}
SCHEDULER = "ddim"


@dataclass
class Bench:
    """Publishes files, serves them, and asks diffusers' pipelines for the same picture."""

    running: Any
    folders: dict[str, Path]
    diffusers_alone: Callable[..., Any]
    pipelines: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    counter: Iterator[int] = field(default_factory=itertools.count)

    def pipeline(self, family: str) -> Any:
        """A copy, to be changed."""
        if family not in self.pipelines:
            self.pipelines[family] = DiffusionPipeline.from_pretrained(self.folders[family], local_files_only=True)
        parts = self.pipelines[family].components
        adapted = {name: copy.deepcopy(parts[name]) for name in parts if name == "unet" or name.startswith("text_")}
        return type(self.pipelines[family])(**{**parts, **adapted})

    def publish(self, family: str, path: Path, **options: Any) -> Version:
        with Registry.open(self.running.home) as registry:
            return registry.publish(path, f"f/n{next(self.counter)}", base=f"base/{family}", **options)

    def compatibility(self, family: str) -> BaseCompatibility:
        with Registry.open(self.running.home) as registry:
            found = registry.resolve(f"base/{family}").manifest.compatibility
        assert isinstance(found, BaseCompatibility)
        return found

    def request(self, family: str, *adapters: Adapter, **changes: Any) -> Request:
        values = {**PLAIN, "base": f"base/{family}", "scheduler": SCHEDULER, "adapters": adapters}
        return Request.parse({**values, **changes})

    def draw(self, family: str, *adapters: Adapter, **changes: Any) -> Tensor:
        return self.running.run([self.request(family, *adapters, **changes)])[0].latents  # type: ignore[no-any-return]

    def reference(self, family: str, pipeline: Any) -> Tensor:
        latents: Tensor = self.diffusers_alone({"base": self.folders[family]}, self.request(family), pipeline).latents
        return latents

    def compare(
        self, family: str, path: Path, pipeline: Any, *, name: str, oracle: str, weight: float = 1.0, **options: Any
    ) -> Version:
        """Publish, draw, and hold the latents to what `pipeline` draws."""
        version = self.publish(family, path, **options)
        ours = self.draw(family, Adapter(ref=version.ref, weight=weight))
        theirs = self.reference(family, pipeline)
        if family not in self.plain:
            self.plain[family] = self.reference(family, self.pipeline(family))
        error = float((ours - theirs).abs().max())
        note(name, family, oracle, error, float((theirs - self.plain[family]).abs().max()))
        return version
