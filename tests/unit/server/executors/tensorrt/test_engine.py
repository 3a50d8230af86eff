"""An engine runs on what stands at its addresses, within its profiles, and everything that can go wrong has a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scumble.errors import IntegrityError, OutOfMemory, Refused, ScumbleError, Unavailable
from scumble_build.engines.api import Flavour
from scumble_build.engines.key import EngineKey
from scumble_build.engines.profiles import WHOLE, Profile, Range
from scumble_build.engines.store import Pulled, StoredEngine
from scumble_build.export.manifest import GraphManifest
from scumble_server.executors.device import Buffers, Graphs, Stepping
from scumble_server.executors.tensorrt.engine import RunningEngine
from support.fake_tensorrt import FakeTensorRT, StrictCapture, make_plan
from support.tiny_graph import make_graph

CPU = torch.device("cpu")
SMALL, LARGE = Profile({"rows": Range(1, 2, 2)}), Profile({"rows": Range(2, 4, 8)})


def stepping() -> Stepping:
    return Stepping(Buffers(CPU), Graphs(StrictCapture()))


def pulled(folder: Path, *profiles: Profile, flavour: Flavour = Flavour.TENSORRT_RTX, **changed: object) -> Pulled:
    onnx, manifest_file = make_graph(folder, "float32")
    manifest = GraphManifest.read(manifest_file)
    plan = folder / "engine.plan"
    make_plan(onnx, manifest, profiles or (WHOLE,), plan)
    key = EngineKey("denoiser", "g", "b", flavour, "1.7.1", (89,), "fp32", "l", [], {})
    return Pulled(StoredEngine(key, None), manifest.model_copy(update=changed), plan)  # type: ignore[arg-type]


def running(folder: Path, *profiles: Profile, fake: FakeTensorRT | None = None, **changed: object) -> RunningEngine:
    return RunningEngine(fake or FakeTensorRT(), pulled(folder, *profiles, **changed), stepping(), CPU)  # type: ignore[arg-type]


def feeds(rows: int = 2, tokens: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, tokens, 16, generator=generator) for name in ("x", "more")}


def oracle(folder: Path, given: dict[str, torch.Tensor]) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "denoiser.onnx"))
    return torch.from_numpy(session.run(None, {name: each.numpy() for name, each in given.items()})[0])


def test_an_engine_computes_what_its_graph_says_at_every_shape_and_a_known_shape_allocates_nothing(
    tmp_path: Path,
) -> None:
    lent, fake = stepping(), FakeTensorRT()
    engine = RunningEngine(fake, pulled(tmp_path), lent, CPU)  # type: ignore[arg-type]
    for seed, (rows, tokens) in enumerate([(8, 64), (2, 8), (1, 4), (8, 64), (2, 8), (8, 64)]):
        given = feeds(rows, tokens, seed)
        assert torch.allclose(engine.run(given)["y"], oracle(tmp_path, given), atol=1e-5)
    assert lent.buffers.allocations == 4  # x, more, y and scratch, at the largest shape, which came first
    assert lent.graphs.captured == 2
    assert [context.captured_with is not None for context in fake.contexts] == [False, True, True], "a context each"


def test_the_first_profile_that_takes_a_shape_runs_it_and_each_has_a_context(tmp_path: Path) -> None:
    fake = FakeTensorRT()
    engine = running(tmp_path, SMALL, LARGE, fake=fake)
    for rows in (2, 8, 1, 4):
        engine.run(feeds(rows))
    assert {context.profile: context.runs for context in fake.contexts} == {0: 2, 1: 2}


def test_a_shape_outside_every_profile_is_refused_with_what_was_built(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"x \(9, 8, 16\) is not within \(2, 4, 16\) to \(8, 64, 16\)"):
        running(tmp_path, SMALL, LARGE).run(feeds(9))


def test_inputs_are_cast_to_what_the_graph_takes(tmp_path: Path) -> None:
    given = {name: each.half() for name, each in feeds().items()}
    found = running(tmp_path).run(given)["y"]
    assert torch.allclose(found, oracle(tmp_path, {name: each.float() for name, each in given.items()}), atol=1e-5)


def test_engines_share_buffers_and_take_their_graphs_with_them(tmp_path: Path) -> None:
    lent = stepping()
    one, two = (RunningEngine(FakeTensorRT(), pulled(tmp_path / name), lent, CPU) for name in "ab")  # type: ignore[arg-type]
    given = feeds()
    first = one.run(given)["y"].clone()
    for engine in (two, one, two):
        assert torch.equal(engine.run(given)["y"], first)
    assert lent.buffers.allocations == 4
    assert len(lent.graphs.keys()) == 2
    two.close()
    assert len(lent.graphs.keys()) == 1


def failing(what: str, words: str) -> Callable[[str], str | None]:
    return lambda asked: words if asked == what else None


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("CUDA error: out of memory", OutOfMemory),
        ("The engine plan file was built with version 1.6", Refused),
        ("engine's compute capability 8.6 does not match", Refused),
        ("cudaError 35: CUDA driver version is insufficient", Unavailable),
        ("Magic tag does not match", IntegrityError),
    ],
)
def test_a_plan_that_is_not_taken_is_typed_by_what_tensorrt_says(
    tmp_path: Path, words: str, error: type[ScumbleError]
) -> None:
    with pytest.raises(error) as caught:
        running(tmp_path, fake=FakeTensorRT(fails=failing("deserialize", words)))
    assert type(caught.value) is error


def test_a_corrupt_plan_is_an_integrity_error(tmp_path: Path) -> None:
    found = pulled(tmp_path)
    found.plan.write_bytes(b"\0" * 100)
    with pytest.raises(IntegrityError, match="corrupt"):
        RunningEngine(FakeTensorRT(), found, stepping(), CPU)  # type: ignore[arg-type]


def test_a_plan_whose_head_is_of_another_machine_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="another GPU, driver or TensorRT"):
        running(tmp_path, fake=FakeTensorRT(validity="INVALID"))


def test_an_engine_that_is_not_what_its_manifest_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not what its manifest says"):
        running(tmp_path, outputs=())


def test_memory_that_runs_out_in_a_run_is_typed_and_the_next_run_works(tmp_path: Path) -> None:
    fake = FakeTensorRT()
    engine = running(tmp_path, fake=fake)
    fake.fails = failing("run", "CUDA error: out of memory")
    with pytest.raises(OutOfMemory):
        engine.run(feeds())
    fake.fails = failing("run", "an illegal memory access was encountered")
    with pytest.raises(ScumbleError, match="a run failed: an illegal") as caught:
        engine.run(feeds())
    assert type(caught.value) is ScumbleError
    fake.fails = lambda _: None
    given = feeds()
    assert torch.allclose(engine.run(given)["y"], oracle(tmp_path, given), atol=1e-5)


def test_what_the_gpu_has_compiled_is_kept_beside_the_plan_and_read_again(tmp_path: Path) -> None:
    engine = running(tmp_path)
    engine.run(feeds())
    engine.close()
    assert (tmp_path / "runtime.cache").read_bytes() == b"kernels"
    assert running(tmp_path)._cache.content == b"kernels"  # type: ignore[union-attr]


def test_tensorrt_has_no_runtime_cache(tmp_path: Path) -> None:
    engine = running(tmp_path, flavour=Flavour.TENSORRT)
    engine.run(feeds())
    engine.close()
    assert not (tmp_path / "runtime.cache").exists()
