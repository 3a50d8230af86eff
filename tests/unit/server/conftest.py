"""A running service over the tiny base, with LoRAs published beside it, and diffusers as the oracle."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from scumble.errors import Refused
from scumble_registry import Registry
from scumble_server.config import ServerConfig, default_executor
from scumble_server.service import Service
from support.oracle import diffusers_alone
from support.running import Running


@pytest.fixture(scope="session")
def published(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, make_lora: object
) -> tuple[Path, dict[str, Path]]:
    """A registry home with `tiny/base` and the LoRAs `l/a` (rank 4), `l/b` (rank 12), `l/plain` (UNet only)."""
    home = tmp_path_factory.mktemp("home")
    files = {"base": tiny_base}
    kinds = {
        "l/a": {"seed": 1},
        "l/b": {"seed": 2, "rank": 12},
        "l/plain": {"seed": 3, "rank": 20, "text": False},
        "l/full": {"seed": 5, "rank": 4, "full": True},
        "l/mixed": {"seed": 4, "rank": 8, "alphas": {"to_q": 3.0, "to_v": 24.0, "fc1": 2.0}},
    }
    with Registry.open(home, create=True) as registry:
        registry.publish(tiny_base, name="tiny/base")
        for name, how in kinds.items():
            files[name] = make_lora(tiny_base, tmp_path_factory.mktemp("lora"), **how)  # type: ignore[operator]
            registry.publish(files[name], name=name, base="tiny/base")
    return home, files


@pytest.fixture(scope="session")
def running(published: tuple[Path, dict[str, Path]], start: Callable[..., Running]) -> Iterator[Running]:
    home, files = published
    started = start(home, "tiny/base", files)
    yield started
    started.service.close()


@pytest.fixture(scope="session", name="diffusers_alone")
def _diffusers_alone() -> object:
    return diffusers_alone


EXECUTORS = ("torch", *(("onnxruntime",) if find_spec("onnxruntime") is not None else ()))
"""Those that this machine has; engines need a GPU."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is marked so runs over every executor, fixtures and all."""
    marked = metafunc.definition.get_closest_marker("every_executor") is not None
    if marked and "executor" in metafunc.fixturenames:
        metafunc.parametrize("executor", EXECUTORS, indirect=True, scope="session")


_TORCH_ONLY = r"is a (hypernetwork on self-attention|ControlNet-LLLite), which changes the graph.*--executor torch"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """What only torch's graphs can do, others refuse by name, and say so: that is right too."""
    try:
        return (yield)
    except Refused as error:
        given = pyfuncitem.callspec.params.get("executor") if hasattr(pyfuncitem, "callspec") else None
        if given in {None, "torch"} or not re.search(_TORCH_ONLY, error.message):
            raise
        return True


@pytest.fixture(scope="session")
def executor(request: pytest.FixtureRequest) -> str:
    """What services run with that say nothing else: `SCUMBLE_EXECUTOR`, or each in turn (`every_executor`)."""
    return str(getattr(request, "param", default_executor()))


@pytest.fixture(scope="session")
def start(executor: str, graph_cache: Path) -> Callable[..., Running]:
    """Opens a service; graphs that ONNX Runtime needs are exported once for all tests."""

    def begin(home: Path, base: str, files: dict[str, Path], **config: Any) -> Running:
        chosen = ServerConfig(home=home, base=base, **{"executor": executor, **config})
        kept = home / "cache" / "onnx"
        if chosen.executor == "onnxruntime" and not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            kept.symlink_to(graph_cache)
        return Running(Service.open(chosen), home, files)

    return begin
