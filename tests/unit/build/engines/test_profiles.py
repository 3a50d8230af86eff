"""Profiles from a file: ranges of axes, and what is wrong with them, said before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from scumble.errors import InvalidRequest, NotFound
from scumble_build.engines import profiles
from scumble_build.engines.profiles import WHOLE, Range
from scumble_build.export.manifest import GraphManifest
from support.places import REPOSITORY
from support.tiny_graph import make_graph


@pytest.fixture
def manifest(tmp_path: Path) -> GraphManifest:
    return GraphManifest.read(make_graph(tmp_path)[1])


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "profile.toml"
    file.write_text(text)
    return file


def test_a_file_narrows_axes_and_the_rest_stays_as_the_manifest_says(tmp_path: Path, manifest: GraphManifest) -> None:
    (profile,) = profiles.read(write(tmp_path, "[[profile]]\nrows = [2, 4, 8]\n"))
    assert profile.shapes(manifest) == dict.fromkeys(("x", "more"), ((2, 4, 16), (4, 8, 16), (8, 64, 16)))


def test_one_number_is_the_only_size(tmp_path: Path, manifest: GraphManifest) -> None:
    (profile,) = profiles.read(write(tmp_path, "[[profile]]\nrows = 2\ntokens = 8\n"))
    assert profile.shapes(manifest)["x"] == ((2, 8, 16),) * 3


def test_a_profile_may_be_for_some_graphs_and_others_keep_their_whole_range(
    tmp_path: Path, manifest: GraphManifest
) -> None:
    text = '[[profile]]\nrows = 2\ngraphs = ["other"]\n[[profile]]\nrows = 4\ngraphs = ["other", "more"]\n'
    wanted = profiles.read(write(tmp_path, text))
    assert profiles.of(manifest, wanted) == (WHOLE,)
    other = manifest.model_copy(update={"graph": "other"})
    assert [each.axes["rows"] for each in profiles.of(other, wanted)] == [Range(2, 2, 2), Range(4, 4, 4)]


def test_graphs_may_be_patterns(tmp_path: Path, manifest: GraphManifest) -> None:
    (wanted,) = profiles.read(write(tmp_path, '[[profile]]\nrows = 2\ngraphs = ["vae_*"]\n'))
    named = {name: manifest.model_copy(update={"graph": name}) for name in ("vae_decoder", "vae_encoder", "unet.bare")}
    assert [name for name, each in named.items() if profiles.of(each, [wanted]) == (wanted,)] == [
        "vae_decoder",
        "vae_encoder",
    ]
    profiles.check_names([wanted], named.values())
    with pytest.raises(InvalidRequest, match=r"the graph vae_\*"):
        profiles.check_names([wanted], [named["unet.bare"]])


@pytest.mark.parametrize(("file", "side"), [("sd15", 64), ("sdxl", 128)])
def test_the_usual_sizes_are_those_that_are_shipped(file: str, side: int) -> None:
    assert profiles.read(REPOSITORY / "deploy" / "profiles" / f"{file}.toml") == profiles.usual(side)


def test_what_stands_in_a_key_is_every_range_written_out(manifest: GraphManifest) -> None:
    assert profiles.described(manifest, (WHOLE,)) == [{"rows": [1, 2, 8], "tokens": [4, 8, 64]}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[profile]]\nrows = [2, 1, 8]\n", "least ≤ usual ≤ most"),
        ("[[profile]]\nrows = [1, 2]\n", "rows must be a number, or"),
        ("[[profile]]\nrows = true\n", "rows must be a number, or"),
        ('[[profile]]\ngraphs = "x"\n', "graphs must be a list of names"),
        ("rows = 2\n", r"must have \[\[profile\]\] tables"),
        ("profile = []\n", r"must have \[\[profile\]\] tables"),
        ("[[profile\n", "is not TOML"),
    ],
)
def test_a_file_that_means_nothing_is_refused_with_the_reason(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        profiles.read(write(tmp_path, text))


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        profiles.read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "says"),
    [("rowz = 2", "the axis rowz, which no graph here has"), ('graphs = ["unet"]', "the graph unet, which no graph")],
)
def test_a_misspelt_name_is_refused(tmp_path: Path, manifest: GraphManifest, text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        profiles.check_names(profiles.read(write(tmp_path, f"[[profile]]\n{text}\n")), [manifest])


def test_a_size_between_two_steps_of_an_axis_is_refused(tmp_path: Path, manifest: GraphManifest) -> None:
    (profile,) = profiles.read(write(tmp_path, "[[profile]]\ntokens = [4, 6, 8]\n"))
    with pytest.raises(InvalidRequest, match="in steps of 4"):
        profile.shapes(manifest)
