"""The cache of materialised versions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scumble_registry import Registry

BaseWriter = LoraWriter = Callable[..., Path]


def test_callers_that_materialise_at_once_get_the_same_whole_folder(
    registry: Registry, write_base: BaseWriter, home: Path
) -> None:
    version = registry.publish(write_base(), "demo/base")
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: registry.materialise(version), range(16)))
    assert len(folders) == 1
    assert [path.name for path in (home / "cache").iterdir()] == [folders.pop().name]
