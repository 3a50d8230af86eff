from __future__ import annotations

import hashlib
import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from scumble.errors import IntegrityError, InvalidRequest, Refused
from scumble.request import SchedulerName, TimestepSpacing
from scumble_registry.blob import Blob
from scumble_registry.compatibility import LoraCompatibility
from scumble_registry.manifest import Manifest, Sampling, canonical_json

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)
BLOBS = st.builds(Blob, digest=st.integers(0, 2**256 - 1).map("sha256:{:064x}".format), size=st.integers(0, 2**40))
PATHS = st.lists(st.sampled_from(["unet", "a.json", "é"]), min_size=1, max_size=3).map("/".join)
SHAPES = st.lists(st.integers(1, 4096), min_size=2, max_size=4).map(tuple)
LORAS = st.builds(
    LoraCompatibility,
    family=st.sampled_from(["sd1", "sdxl", None]),
    requires=st.dictionaries(TEXT, SHAPES, max_size=3),
    ranks=st.dictionaries(TEXT, st.integers(1, 64), max_size=3),
)
MANIFESTS = st.builds(
    Manifest,
    files=st.dictionaries(PATHS, BLOBS, max_size=3),
    record=st.none() | BLOBS,
    compatibility=LORAS,
    trigger_words=st.lists(TEXT, max_size=2).map(tuple),
    license=st.none() | TEXT,
    description=TEXT,
    provenance=st.dictionaries(TEXT, JSON, max_size=3),
    metrics=st.dictionaries(TEXT, JSON, max_size=3),
    sample_grid=st.none() | BLOBS,
    sampling=st.none()
    | st.builds(
        Sampling,
        scheduler=st.sampled_from(get_args(SchedulerName)),
        steps=st.none() | st.integers(1, 1000),
        guidance_scale=st.none() | st.floats(0, 100),
        timestep_spacing=st.none() | st.sampled_from(get_args(TimestepSpacing)),
        rescale_betas=st.none() | st.booleans(),
        eta=st.none() | st.floats(0, 1),
    ),
)


def manifest(**fields: Any) -> Manifest:
    return Manifest(files={}, compatibility=LoraCompatibility(family=None, requires={}, ranks={}), **fields)


@given(MANIFESTS)
def test_a_manifest_survives_its_canonical_form_and_that_has_one_spelling(found: Manifest) -> None:
    text = found.canonical()
    again = Manifest.parse(text, found.digest)
    assert again == found
    assert again.canonical() == text
    assert found.digest == f"sha256:{hashlib.sha256(text).hexdigest()}"


@given(MANIFESTS)
def test_the_canonical_form_is_what_the_page_says(found: Manifest) -> None:
    data = json.loads(found.canonical())
    assert found.canonical() == json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert None not in data.values()


def test_the_order_in_which_metadata_is_given_does_not_matter() -> None:
    assert manifest(metrics={"a": 1, "b": 2}).digest == manifest(metrics={"b": 2, "a": 1}).digest


def test_another_word_of_metadata_is_another_digest() -> None:
    assert manifest(description="ink").digest != manifest(description="Ink").digest


def test_an_altered_manifest_is_an_integrity_error() -> None:
    found = manifest(description="ink")
    with pytest.raises(IntegrityError, match="altered"):
        Manifest.parse(found.canonical().replace(b"ink", b"oil"), found.digest)


def test_a_manifest_of_a_newer_schema_asks_for_an_upgrade() -> None:
    text = manifest().canonical().replace(b'"schema_version":1', b'"schema_version":2')
    with pytest.raises(Refused, match="upgrade"):
        Manifest.parse(text, f"sha256:{hashlib.sha256(text).hexdigest()}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {1, 2}, b"bytes"])
def test_what_json_cannot_say_is_an_invalid_request(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="plain JSON"):
        canonical_json({"value": value})


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a//b", "a/./b", "", "a\\b"])
def test_a_path_that_leaves_the_folder_is_no_manifest(path: str) -> None:
    blob = Blob(digest="sha256:" + "0" * 64, size=0)
    with pytest.raises(ValidationError, match="not a path inside"):
        Manifest(files={path: blob}, compatibility=LoraCompatibility(family=None, requires={}, ranks={}))


def test_a_manifest_without_sampling_has_the_digest_that_it_had_before_there_was_any() -> None:
    before = "sha256:902137c0a44d8f96b39d5313b3cf0716a5d722e8816dc9bcd289719e9f5591aa"
    assert manifest(description="ink").digest == before
    assert manifest(description="ink", sampling=Sampling(steps=4)).digest != before


def test_sampling_is_kept_without_what_it_leaves_open() -> None:
    found = manifest(sampling=Sampling(scheduler="lcm", steps=4))
    assert json.loads(found.canonical())["sampling"] == {"scheduler": "lcm", "steps": 4}


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({}, "sampling"),
        ([], "sampling"),
        ({"scheduler": "magic"}, "sampling.scheduler"),
        ({"steps": 0}, "sampling.steps"),
        ({"scheduler": "tcd", "eta": 2}, "sampling.eta"),
        ({"eta": 0.5}, "sampling"),
        ({"cfg": 1}, "sampling.cfg"),
    ],
)
def test_sampling_that_cannot_be_is_refused_by_name(data: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Sampling.parse(data)
    assert caught.value.fields["field"] == field
