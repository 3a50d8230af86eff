"""The folder that a finished training leaves: the adapter and what its manifest needs, ready to publish.

OUT/<the adapter's file or files>
OUT/training.json       trigger words, license, provenance, metrics
OUT/README.md           the model card
OUT/sample_grid.png

All of it becomes part of the version; `Registry.pull` writes it into a folder again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scumble.errors import InvalidRequest, NotFound, Refused
from scumble.files import write_whole
from scumble_registry.formats import base as base_format
from scumble_registry.formats import dreambooth
from scumble_registry.hashes import content_digest
from scumble_registry.store.catalogue import Status

if TYPE_CHECKING:
    from scumble_registry.registry import Registry
    from scumble_registry.store.catalogue import Version

RESULT = "training.json"
CARD = "README.md"
GRID = "sample_grid.png"
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Result:
    """The content of training.json. `adapter` is a file name inside OUT."""

    adapter: str
    license: str | None
    description: str
    trigger_words: tuple[str, ...]
    provenance: Mapping[str, Any]
    metrics: Mapping[str, Any]


def write_result(out: Path, result: Result) -> None:
    """Write training.json atomically. It is written last: if it exists, the run is finished."""
    write_whole(out / RESULT, (json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n").encode())


def read_result(out: Path) -> Result | None:
    """Read the result of a finished run, or return None if this is not its folder. Raises Refused for a broken one."""
    file = out / RESULT
    if not file.is_file() or file.stat().st_size > _MAX_BYTES:
        return None
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except ValueError as error:
        raise Refused(f"{file} is no JSON ({error}); mend it, or remove it and publish the weights alone") from error
    if not isinstance(content, dict) or content.keys() != {field.name for field in fields(Result)}:
        return None  # another program's
    return Result(**{**content, "trigger_words": tuple(content["trigger_words"])})


def publish_result(
    registry: Registry,
    out: Path,
    name: str,
    *,
    base: str | None,
    **stated: Any,
) -> Version:
    """Publish the result in `out` as the next version of `name`; the same result again is the same version.

    `base` None: the base that it was trained on, if that is published here. `stated`: further arguments of
    `Registry.publish`; what is given there precedes what the result says.
    """
    result = read_result(out)
    if result is None:
        raise NotFound(f"there is no finished training in {out}: it has no {RESULT}")
    adapter, base = _inside(out, result.adapter), base or _parent(registry, result)
    grid, card = out / GRID, out / CARD
    said = {
        "license": result.license,
        "trigger_words": result.trigger_words,
        "provenance": dict(result.provenance),
        "metrics": dict(result.metrics),
        "sample_grid": grid if grid.is_file() else None,
        "card": card if card.is_file() else None,
        "description": result.description,
    }
    with _whole(registry, adapter, base) as whole:
        return registry.publish(whole, name, base=base, **said | {key: value for key, value in stated.items() if value})


def result_of(version: Version, adapter: str) -> Result:
    """Return what a version's manifest says, for the folder that `pull` makes, in which `adapter` is."""
    manifest = version.manifest
    return Result(
        adapter, manifest.license, manifest.description, manifest.trigger_words, manifest.provenance, manifest.metrics
    )


def _parent(registry: Registry, result: Result) -> str | None:
    """Return the reference of the base that was trained on, if it is published here.

    `parent` is its version's digest, or its content's if it was not published when it was trained on.
    """
    parent = result.provenance.get("parent")
    try:
        return registry.resolve_digest(str(parent)).ref
    except (InvalidRequest, NotFound, Refused):
        everything = (version for name in registry.names() for version in registry.versions(name))
    same = [
        version.ref
        for version in everything
        if version.manifest.kind == base_format.KIND
        and version.status is Status.APPROVED
        and content_digest({name: blob.hex for name, blob in version.manifest.files.items()}) == parent
    ]
    return same[-1] if same else None


def _inside(out: Path, name: str) -> Path:
    """Raises Refused for a name that leads out of the folder, or to nothing."""
    adapter = out / name
    if not adapter.resolve().is_relative_to(out.resolve()) or not adapter.exists():
        raise Refused(f"{out / RESULT} names the adapter {name!r}, which is not in this folder")
    return adapter


@contextmanager
def _whole(registry: Registry, adapter: Path, base: str | None) -> Iterator[Path]:
    """Yield `adapter`, or for a difference to the base (`--save-delta`) the whole checkpoint's folder; of a folder that
    is the adapter itself, all but what is said about it.
    """
    is_difference = dreambooth.is_difference(adapter)
    if is_difference and base is None:
        raise Refused(
            f"{adapter} holds the difference to the base that it was trained on, which is not published here under the "
            "digest that training.json names; publish it with --base REF"
        )
    if not is_difference and not (adapter / RESULT).is_file():
        yield adapter
        return
    with tempfile.TemporaryDirectory(prefix="scumble-whole-") as temporary:
        whole = Path(temporary) / adapter.name
        if not is_difference:
            shutil.copytree(adapter, whole, ignore=lambda _folder, names: {RESULT, CARD, GRID} & {*names})
            yield whole
            return
        assert base is not None
        dreambooth.restore(adapter, registry.materialise(registry.resolve(base)), whole)
        yield whole
