"""`ls`: versions with what points at them and what they were published for, and which of them a caller asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scumble.errors import NotFound
from scumble_registry.manifest import Manifest
from scumble_registry.references import parse, parse_digest
from scumble_registry.registry import Registry
from scumble_registry.store.catalogue import Status, Version


@dataclass(frozen=True, slots=True)
class Listed:
    """A version; `aliases` are those that point at it, `base` is the reference of the base it was published for."""

    version: Version
    aliases: tuple[str, ...]
    base: str | None
    """The digest where that base is not published here; None for a version without a base."""


@dataclass(frozen=True, slots=True)
class Filter:
    """What the listed versions must all be. None asks for nothing."""

    kind: str | None = None
    base: str | None = None
    """`ns/name` for any version of a base, a reference for one, or a digest of a base that is not published here."""
    trigger: str | None = None
    """A part of a trigger word, in upper or lower case."""
    license: str | None = None
    """In upper or lower case."""
    status: Status | None = None
    alias: str | None = None


def list_versions(registry: Registry, name: str | None = None, which: Filter = Filter()) -> tuple[Listed, ...]:
    """Return the versions of all names, or of one, sorted by name and number.

    Raises NotFound for an unknown name or base, InvalidRequest for a malformed one.
    """
    bases = _digests(registry, which.base) if which.base is not None else None
    everything = {each: registry.versions(each) for each in registry.names()}
    refs = {version.digest: version.ref for versions in everything.values() for version in versions}
    chosen = {name: everything.get(name) or registry.versions(name)} if name is not None else everything
    listed: list[Listed] = []
    for each, versions in chosen.items():
        aliases = registry.aliases(each)
        for version in versions:
            pointing = tuple(alias for alias, number in aliases.items() if number == version.version)
            base = version.manifest.base
            if _is_asked_for(version, pointing, which, bases):
                listed.append(Listed(version, pointing, refs.get(base, base) if base is not None else None))
    return tuple(listed)


def _is_asked_for(version: Version, aliases: Iterable[str], which: Filter, bases: frozenset[str] | None) -> bool:
    manifest = version.manifest
    return (
        which.kind in {None, manifest.kind}
        and which.status in {None, version.status}
        and (bases is None or manifest.base in bases)
        and (which.trigger is None or _has_word(manifest, which.trigger))
        and (which.license is None or which.license.casefold() == (manifest.license or "").casefold())
        and (which.alias is None or which.alias in aliases)
    )


def _has_word(manifest: Manifest, part: str) -> bool:
    return any(part.casefold() in word.casefold() for word in manifest.trigger_words)


def _digests(registry: Registry, base: str) -> frozenset[str]:
    """Return the digests of the bases that a filter names. Raises NotFound, InvalidRequest."""
    if base.startswith("sha256:"):
        return frozenset({parse_digest(base)})
    if parse(base).name != base:
        return frozenset({registry.find(base).digest})
    digests = frozenset(version.digest for version in registry.versions(base))
    if not digests:
        raise NotFound(f"no version of {base} can be read; `scumble registry fsck` says why", ref=base)
    return digests
