"""Which tritonserver is taken, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from scumble.errors import Unavailable
from scumble_server.triton import binaries
from scumble_server.triton.binaries import PYTHON, TRITON_KEY, VERSION_KEY, find_triton


def make_triton(root: Path, python: str = PYTHON, *, several: bool = False) -> Path:
    stubs = root / "python_backend_stubs" / python if several else root / "backends" / "python"
    for folder in (root / "bin", root / "backends" / "python", stubs):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "bin" / "tritonserver").touch()
    (root / "backends" / "python" / "libtriton_python.so").touch()
    (stubs / "triton_python_backend_stub").write_text(f"... libpython{python}.so.1.0 ...")
    return root


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(TRITON_KEY, raising=False)
    monkeypatch.setattr(binaries, "CONTAINER", tmp_path / "container")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)


def test_the_containers_is_found(tmp_path: Path) -> None:
    make_triton(tmp_path / "container")
    assert find_triton().server == tmp_path / "container" / "bin" / "tritonserver"


@pytest.mark.parametrize("where", ["", "bin/tritonserver"])
def test_a_named_one_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    make_triton(tmp_path / "container")
    named = make_triton(tmp_path / "named", several=True)
    monkeypatch.setenv(TRITON_KEY, str(named / where))
    assert find_triton().server == named / "bin" / "tritonserver"
    assert PYTHON in str(find_triton().stub)


def test_a_named_one_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    make_triton(tmp_path / "container")
    with pytest.raises(Unavailable, match="elsewhere"):
        find_triton(tmp_path / "elsewhere")


def test_without_any_it_says_what_to_install() -> None:
    with pytest.raises(Unavailable, match="nvidia-pytriton"):
        find_triton()


@pytest.mark.parametrize(
    ("noted", "version", "faces_networks"),
    [("2.51.0", (2, 51, 0), False), ("2.71.0\n", (2, 71, 0), True), ("2.80.1dev", (2, 80, 1), True), ("", None, False)],
)
def test_its_version_says_whether_networks_may_reach_it(
    tmp_path: Path, noted: str, version: tuple[int, ...] | None, faces_networks: bool
) -> None:
    root = make_triton(tmp_path / "named")
    (root / "TRITON_VERSION").write_text(noted)
    install = find_triton(root)
    assert (install.version, install.faces_networks) == (version, faces_networks)


def test_the_containers_environment_speaks_for_its_own_copy_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_triton(tmp_path / "container")
    monkeypatch.setenv(VERSION_KEY, "2.74.0")
    assert find_triton().faces_networks
    assert not find_triton(make_triton(tmp_path / "named")).faces_networks


def test_a_stub_of_another_python_is_refused(tmp_path: Path) -> None:
    make_triton(tmp_path / "container", "3.9")
    with pytest.raises(Unavailable, match=r"another Python"):
        find_triton()


def test_a_triton_without_python_is_refused(tmp_path: Path) -> None:
    root = make_triton(tmp_path / "container")
    (root / "backends" / "python" / "libtriton_python.so").unlink()
    with pytest.raises(Unavailable, match="no Python backend"):
        find_triton()
