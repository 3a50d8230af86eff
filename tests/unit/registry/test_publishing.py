"""Publishers that die half-way, and many at once: in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scumble.errors import NotFound
from scumble_registry import Registry

BaseWriter = LoraWriter = Callable[..., Path]

DIE = """
import os, signal, sys
from pathlib import Path
from scumble_registry import Registry, publishing
from scumble_registry.store import catalogue
from scumble_registry.store.blobs import FileStore

home, file, step = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

keep, put, add, alias = FileStore._move, FileStore.put, catalogue.add, catalogue.set_alias
if step == "a blob is written and not yet renamed":
    FileStore._move = die
if step == "the first blob is renamed":
    FileStore._move = lambda *args: (keep(*args), die())
if step == "all blobs are stored":
    catalogue.add = die
if step == "the version is inserted and not committed":
    catalogue.add = lambda *args: (add(*args), die())
if step == "the alias is set and not committed":
    catalogue.set_alias = lambda *args: (alias(*args), die())
with Registry.open(home, create=True) as registry:
    if step == "the version is committed":
        registry.publish(file, "styles/ink", alias="prod")
        die()
    registry.publish(file, "styles/ink", alias="prod")
"""

PUBLISH = """
import sys
from pathlib import Path
from scumble_registry import Registry
home, *files = map(Path, sys.argv[1:])
with Registry.open(home, create=True) as registry:
    for file in files:
        print(registry.publish(file, "styles/ink", alias="prod").version)
"""

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "step",
    [
        "a blob is written and not yet renamed",
        "the first blob is renamed",
        "all blobs are stored",
        "the version is inserted and not committed",
        "the alias is set and not committed",
    ],
)
def test_a_publisher_killed_before_the_commit_leaves_nothing_visible(home: Path, lora: Path, step: str) -> None:
    process = start(DIE, home, lora, step)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -9, errors
    with Registry.open(home) as registry:
        assert registry.names() == ()
        with pytest.raises(NotFound):
            registry.resolve("styles/ink@prod")
        registry.verify()
        version = registry.publish(lora, "styles/ink", alias="prod")
        assert version.version == 1
        assert registry.resolve("styles/ink@prod") == version
        registry.verify()
        registry.record_path(version)


def test_a_publisher_killed_after_the_commit_has_published(home: Path, lora: Path) -> None:
    process = start(DIE, home, lora, "the version is committed")
    process.communicate(timeout=300)
    assert process.returncode == -9
    with Registry.open(home) as registry:
        assert registry.resolve("styles/ink@prod").version == 1
        registry.verify()
        assert registry.publish(lora, "styles/ink").version == 1


def test_processes_that_publish_at_once_into_a_new_registry_leave_no_gap(home: Path, write_lora: LoraWriter) -> None:
    shared = write_lora("shared.safetensors", seed=99)
    own = [[write_lora(f"{i}-{j}.safetensors", seed=10 * i + j) for j in range(3)] for i in range(3)]
    processes = [start(PUBLISH, home, files[0], shared, *files[1:]) for files in own]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, outputs
    numbers = [[int(line) for line in output.split()] for output, _ in outputs]
    assert len({row[1] for row in numbers}) == 1  # the shared file is one version
    with Registry.open(home) as registry:
        assert [version.version for version in registry.versions("styles/ink")] == list(range(1, 11))
        assert {number for row in numbers for number in row} == set(range(1, 11))
        registry.verify()


def test_threads_that_publish_at_once_leave_no_gap(registry: Registry, write_lora: LoraWriter) -> None:
    files = [write_lora(f"{i}.safetensors", seed=i % 6) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        versions = list(pool.map(lambda file: registry.publish(file, "styles/ink"), files))
    assert versions[:6] == versions[6:]
    assert sorted(version.version for version in versions[:6]) == [1, 2, 3, 4, 5, 6]
