"""The catalogue: versions count up, statuses say what resolves, and what is missing is explained by what is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection

from scumble.errors import NotFound, Refused
from scumble_registry import Registry
from scumble_registry.compatibility import VaeCompatibility
from scumble_registry.hashes import FileHash, HashKind
from scumble_registry.manifest import Manifest
from scumble_registry.references import Reference
from scumble_registry.store import catalogue
from scumble_registry.store.catalogue import Status

NAME = "styles/ink"


@pytest.fixture
def manifests(registry: Registry, write_lora: Callable[..., Path]) -> list[Manifest]:
    """Of two LoRAs, published elsewhere."""
    files = [write_lora(f"{seed}.safetensors", seed=seed) for seed in (1, 2)]
    return [registry.publish(file, f"other/n{index}").manifest for index, file in enumerate(files)]


@pytest.fixture
def connection(registry: Registry, manifests: list[Manifest]) -> Iterator[Connection]:  # noqa: ARG001 - published before it locks
    with registry._database.writing() as opened:
        yield opened


def test_new_content_is_the_next_version_and_the_same_content_the_same(
    connection: Connection, manifests: list[Manifest]
) -> None:
    numbers = [catalogue.add(connection, NAME, each, Status.APPROVED).version for each in [*manifests, *manifests]]
    assert numbers == [1, 2, 1, 2]
    assert [version.version for version in catalogue.versions(connection, NAME)] == [1, 2]


def test_a_name_alone_is_its_newest_approved_version(connection: Connection, manifests: list[Manifest]) -> None:
    first = catalogue.add(connection, NAME, manifests[0], Status.APPROVED)
    second = catalogue.add(connection, NAME, manifests[1], Status.STAGED)
    assert catalogue.find(connection, Reference(NAME)) == first
    assert catalogue.find(connection, Reference(NAME, version=2)) == second
    assert second.notice == "styles/ink@2 is staged"
    approved = catalogue.add(connection, NAME, manifests[1], Status.APPROVED)
    assert (approved.version, approved.status, approved.notice) == (2, Status.APPROVED, None)
    assert catalogue.find(connection, Reference(NAME)) == approved


def test_what_is_quarantined_cannot_be_published_or_named_again(
    connection: Connection, manifests: list[Manifest]
) -> None:
    version = catalogue.add(connection, NAME, manifests[0], Status.APPROVED)
    bad = catalogue.set_status(connection, version, Status.QUARANTINED)
    with pytest.raises(Refused, match="is styles/ink@1, which is quarantined"):
        catalogue.add(connection, NAME, manifests[0], Status.APPROVED)
    with pytest.raises(Refused, match="an alias could not resolve to it"):
        catalogue.set_alias(connection, "prod", bad)


def test_an_alias_moves(connection: Connection, manifests: list[Manifest]) -> None:
    first, second = (catalogue.add(connection, NAME, each, Status.APPROVED) for each in manifests)
    catalogue.set_alias(connection, "prod", first)
    catalogue.set_alias(connection, "prod", second)
    assert catalogue.aliases(connection, NAME) == {"prod": 2}
    assert catalogue.find(connection, Reference(NAME, alias="prod")) == second


def test_what_is_missing_is_explained_by_what_is_there(connection: Connection, manifests: list[Manifest]) -> None:
    with pytest.raises(NotFound, match="nothing is published as styles/ink"):
        catalogue.find(connection, Reference(NAME))
    version = catalogue.add(connection, NAME, manifests[0], Status.STAGED)
    with pytest.raises(NotFound, match=r"has no approved version \(it has @1 staged\)"):
        catalogue.find(connection, Reference(NAME))
    catalogue.set_alias(connection, "prod", version)
    with pytest.raises(NotFound, match="there is no styles/ink@7; styles/ink has @1 staged; aliases: @prod"):
        catalogue.find(connection, Reference(NAME, version=7))


def test_the_same_content_is_found_under_all_its_names(connection: Connection, manifests: list[Manifest]) -> None:
    catalogue.add(connection, NAME, manifests[0], Status.APPROVED)
    found = catalogue.find_digest(connection, manifests[0].digest)
    assert [version.ref for version in found] == ["other/n0@1", "styles/ink@1"]


def test_hashes_are_kept_once_and_found_by_how_they_begin(connection: Connection, manifests: list[Manifest]) -> None:
    version = catalogue.add(connection, NAME, manifests[0], Status.APPROVED)
    assert catalogue.not_hashed(connection) == (version,)
    known = FileHash(HashKind.FILE, "ab" * 32)
    catalogue.add_hashes(connection, version, [known])
    catalogue.add_hashes(connection, version, [known])
    assert catalogue.hashes(connection, version) == (known,)
    assert catalogue.not_hashed(connection) == ()
    (match,) = catalogue.find_hash(connection, "abab")
    assert (match.version, match.kind) == (version, HashKind.FILE)
    assert {each.version.ref for each in catalogue.find_hash(connection, version.digest[7:20])} >= {version.ref}
    assert catalogue.find_hash(connection, "abac") == ()


def test_a_name_holds_one_kind(connection: Connection, manifests: list[Manifest]) -> None:
    catalogue.add(connection, NAME, manifests[0], Status.APPROVED)
    vae = VaeCompatibility(latent_channels=4, scale=8, parameters=1)
    other = manifests[0].model_copy(update={"compatibility": vae})
    with pytest.raises(Refused, match="holds versions of kind lora; publish this vae under another name"):
        catalogue.add(connection, NAME, other, Status.APPROVED)
