"""A server on engines draws what it draws on torch; where there is none that may be loaded, torch serves.

`FakeTensorRT` computes with ONNX Runtime at the addresses that it is given: feeds, buffers, shapes, profiles and
threads are the executor's own. What only a GPU can show is not shown here.
"""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scumble.errors import IntegrityError, NotFound, Refused
from scumble.request import Adapter, Request
from scumble_build.engines import profiles, store
from scumble_build.engines.api import Flavour
from scumble_build.engines.builder import Report
from scumble_build.engines.key import EngineKey, Machine
from scumble_build.engines.profiles import WHOLE, Profile, Range, usual
from scumble_build.engines.store import Pulled, StoredEngine
from scumble_build.export.command import find_base, open_base
from scumble_build.export.control import NetGraphs
from scumble_build.export.manifest import GraphManifest
from scumble_build.export.provenance import code_digest
from scumble_build.graphs.families import FAMILIES
from scumble_registry import Registry, Version
from scumble_server.config import ServerConfig
from scumble_server.executors import choice
from scumble_server.executors.device import Buffers, Graphs, Stepping
from scumble_server.executors.preview import fit
from scumble_server.executors.tensorrt import fitting
from scumble_server.executors.tensorrt.engines import EngineRuntime, Engines
from scumble_server.executors.tensorrt.executor import TensorRTExecutor
from scumble_server.executors.tensorrt.fitting import pull_base
from scumble_server.executors.torch.executor import TorchExecutor, weights_bytes
from scumble_server.executors.torch.vae import TorchVae
from support.control_nets import load_unet, make_net
from support.engines import make_engines
from support.every_kind import coarse_png
from support.fake_tensorrt import FakeTensorRT, StrictCapture, make_plan
from support.tiny_variant import make_checkpoint

Running = Any
CPU = torch.device("cpu")
GRAPHS = ("text_encoder", "kv_projection", "unet.small", "vae_decoder", "vae_encoder")
SIX_ROWS = Profile({"rows": Range(1, 2, 6), "resident": Range(1, 8, 20)})


@pytest.fixture(scope="module")
def pulled(tiny_base: Path, graph_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pulled]:
    folder = tmp_path_factory.mktemp("graphs")
    base = find_base(str(tiny_base), folder)
    return make_engines(open_base(base, "fp32"), GRAPHS, folder, graph_cache, of=base.digest, profile=SIX_ROWS)


NARROW = Profile(
    {
        "height": Range(4, 8, 9),
        "width": Range(4, 8, 9),
        "tokens": Range(77, 77, 77),
        "rank_pages": Range(1, 1, 1),
    }
)


def rebuilt(engine: Pulled, shapes: Sequence[Profile], plan: Path) -> Pulled:
    """The same graph, built for other sizes."""
    make_plan(engine.plan.with_suffix(".onnx"), engine.manifest, shapes, plan)
    key = replace(engine.stored.key, profiles=profiles.described(engine.manifest, shapes))
    return Pulled(replace(engine.stored, key=key), engine.manifest, plan)


@pytest.fixture(scope="module")
def narrow(pulled: dict[str, Pulled], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pulled]:
    """The same graphs, built for less."""
    folder = tmp_path_factory.mktemp("narrow")
    found = {}
    for name, each in pulled.items():
        plan = folder / f"{name}.plan"
        profile = NARROW if name.startswith("unet.") else WHOLE
        found[name] = rebuilt(each, (profile,), plan)
    return found


def executor(base: Path, pulled: dict[str, Pulled], *, streams: bool = False) -> TensorRTExecutor:
    weights = TorchExecutor.load(base, FAMILIES["sd1"])
    lent = lambda: Stepping(Buffers(CPU), Graphs(StrictCapture()))  # noqa: E731
    fake = FakeTensorRT(streams=streams)
    engines = Engines(weights.graphs, pulled, EngineRuntime.on(fake, CPU, lent))  # type: ignore[arg-type]
    return TensorRTExecutor(weights, engines, {"executor": "tensorrt"})


def draw(*adapters: Adapter, seed: int = 1) -> Request:
    return Request(prompt="a b", adapters=adapters, steps=3, width=64, height=64, seed=seed, negative_prompt="c")


def test_strangers_are_drawn_on_engines_as_on_torch(
    tiny_base: Path,
    pulled: dict[str, Pulled],
    running: Running,
    published: tuple[Path, dict[str, Path]],
    start: Callable[..., Running],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = executor(tiny_base, pulled)
    monkeypatch.setattr(choice.TensorRTExecutor, "load", lambda *_: made)
    home, files = published
    engines = start(home, "tiny/base", files, executor="tensorrt")
    requests = [
        draw(Adapter(ref="l/a")),
        draw(Adapter(ref="l/b", end=0.5), Adapter(ref="l/plain", weight=0.5), seed=2),
        draw(seed=3),
        draw(Adapter(ref="l/mixed"), seed=4),
    ]
    try:
        assert made.max_rows == 6
        assert made.most_pages == (20, None)
        for found, expected in zip(engines.run(requests), running.run(requests), strict=True):
            assert torch.allclose(found.latents, expected.latents, atol=1e-3)
            assert abs(found.done.images.astype(int) - expected.done.images.astype(int)).max() <= 1
            assert found.done.receipt.engine["executor"] == "tensorrt"
        with pytest.raises(Refused, match=r"graph unet\.full, and this base has no engine of it"):
            engines.run([draw(Adapter(ref="l/full"))])
    finally:
        engines.service.close()


def test_each_thread_runs_engines_on_a_stream_of_its_own_and_no_two_capture_at_once(
    tiny_base: Path,
    pulled: dict[str, Pulled],
    published: tuple[Path, dict[str, Path]],
    start: Callable[..., Running],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stand-in raises at a run on the default stream, and where captures overlap: both would end a real one."""
    streams, numbers = threading.local(), itertools.count(1)

    @contextmanager
    def own_stream(device: str, *, urgent: bool = False) -> Iterator[None]:  # noqa: ARG001
        streams.handle = next(numbers)
        yield
        streams.handle = 0

    monkeypatch.setattr("scumble_server.service.own_stream", own_stream)
    monkeypatch.setattr(
        "scumble_server.executors.tensorrt.engine.stream_handle", lambda _device: getattr(streams, "handle", 0)
    )
    monkeypatch.setattr(choice.TensorRTExecutor, "load", lambda *_: executor(tiny_base, pulled, streams=True))
    home, files = published
    engines = start(home, "tiny/base", files, executor="tensorrt")
    requests = [
        draw(seed=seed).model_copy(update={"prompt": "a b " * (1 + 40 * (seed % 2)), "width": 64 + 8 * (seed % 3)})
        for seed in range(12)
    ]
    try:
        assert len(engines.run(requests)) == 12
        assert engines.service.stats().failed_steps == 0
    finally:
        engines.service.close()


@pytest.mark.parametrize("side", [64, 128])
def test_a_base_starts_and_decodes_tiles_on_the_profiles_that_are_shipped(
    tiny_base: Path, pulled: dict[str, Pulled], tmp_path: Path, side: int
) -> None:
    """The preview is fitted to small latents, and tiles at the edges are smaller than the engine takes."""
    shipped = {}
    for name, each in pulled.items():
        plan = tmp_path / f"{name}.plan"
        shipped[name] = rebuilt(each, profiles.of(each.manifest, usual(side)), plan)
    made = executor(tiny_base, shipped)
    oracle = TorchVae(TorchExecutor.load(tiny_base, FAMILIES["sd1"]).graphs.vae, side // 2)
    assert made.vae.least == side // 2
    assert torch.allclose(fit(made.vae, 4).weights, fit(oracle, 4).weights, atol=0.2)
    latents = torch.randn(1, 4, side, side + 8)
    tiled, expected = (vae.decode(latents, tiled=True) for vae in (made.vae, oracle))
    assert (tiled.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"width": 128}, r"width of the latents \(pixels / 8\) 16 is not within 4 to 9; reduce it"),
        ({"options": {"hires": {"scale": 2.0}}}, r"width of the latents"),
        ({"prompt": "a b " * 60}, r"tokens of the prompt 154 is not within 77 to 77"),
        ({"adapters": (Adapter(ref="l/b"),)}, r"total rank of the LoRAs, in pages of 8, 2 is not within 1 to 1"),
    ],
)
def test_what_engines_were_not_built_for_is_refused_before_any_step(
    tiny_base: Path,
    published: tuple[Path, dict[str, Path]],
    start: Callable[..., Running],
    monkeypatch: pytest.MonkeyPatch,
    narrow: dict[str, Pulled],
    change: dict[str, Any],
    says: str,
) -> None:
    made = executor(tiny_base, narrow)
    monkeypatch.setattr(choice.TensorRTExecutor, "load", lambda *_: made)
    running = start(published[0], "tiny/base", {}, executor="tensorrt")
    try:
        with pytest.raises(Refused, match=says):
            running.run([Request.parse({**draw().model_dump(exclude_none=True), **change})])
        assert running.service.stats().steps == running.service.stats().failed_steps == 0
        assert running.run([draw(Adapter(ref="l/a"))])[0].latents.isfinite().all()
    finally:
        running.service.close()


def test_a_denoiser_without_its_smallest_engine_runs_the_next_larger_one(
    tiny_base: Path, pulled: dict[str, Pulled]
) -> None:
    engines = executor(tiny_base, pulled)._engines
    assert engines["unet.bare"] is engines["unet.small"]
    with pytest.raises(Refused, match=r"scumble build engine --part unet\.guided"):
        engines["unet.guided"]


def test_a_part_without_an_engine_is_named(tiny_base: Path, pulled: dict[str, Pulled]) -> None:
    some = {name: each for name, each in pulled.items() if name in {"text_encoder", "vae_decoder", "vae_encoder"}}
    with pytest.raises(NotFound, match=r"no engine of kv_projection, unet\.small"):
        executor(tiny_base, some)


def test_merged_weights_are_refused(tiny_base: Path, pulled: dict[str, Pulled]) -> None:
    with pytest.raises(Refused, match="merged into weights, which engines do not support"):
        executor(tiny_base, pulled).variant({})


class Shop:
    """A registry with a base, a net and a checkpoint, and their engines, which the executor takes from it."""

    def __init__(self, base: Path, folder: Path, graph_cache: Path) -> None:
        self.home, self._graph_cache = folder / "home", graph_cache
        make_net(load_unet(base), 1).save_pretrained(folder / "net")
        make_checkpoint(base, folder / "tuned", seed=3, components=("unet",))
        with Registry.open(self.home, create=True) as registry:
            self.base = registry.publish(base, "tiny/base")
            self.net = registry.publish(folder / "net", "c/net", base="tiny/base")
            self.tuned = registry.publish(folder / "tuned", "d/tuned", base="tiny/base")
            whole = registry.materialise(self.tuned)
        self.engines: dict[str, dict[str, Pulled]] = {}
        self._build(folder / "net-graphs", NetGraphs.of(make_net(load_unet(base), 1), "fp32"), self.net)
        found = find_base(str(base), folder)
        self._build(folder / "base-graphs", open_base(found, "fp32"), self.base, ON_BASE)
        self._build(folder / "graphs", open_base(replace(found, folder=whole), "fp32"), self.tuned, ON_UNET)

    def _build(self, folder: Path, graphs: Any, of: Version, names: tuple[str, ...] = ()) -> None:
        self.engines[of.digest] = make_engines(
            graphs, names or graphs.names, folder, self._graph_cache, of=of.digest, artifact=of.name
        )

    def executor(self, folder: Path) -> TensorRTExecutor:
        weights = TorchExecutor.load(folder, FAMILIES["sd1"])
        lent = lambda: Stepping(Buffers(CPU), Graphs(StrictCapture()))  # noqa: E731
        runtime = EngineRuntime.on(FakeTensorRT(), CPU, lent)  # type: ignore[arg-type]
        engines = Engines(weights.graphs, self.engines[self.base.digest], runtime)
        return TensorRTExecutor(
            weights, engines, {"executor": "tensorrt"}, lambda version: self.engines.get(version.digest, {})
        )


ON_UNET = ("kv_projection", "unet.guided")
ON_BASE = ("text_encoder", "vae_decoder", "vae_encoder", *ON_UNET)


@pytest.fixture(scope="module")
def shop(tiny_base: Path, graph_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tiny_base, tmp_path_factory.mktemp("shop"), graph_cache)


@pytest.fixture
def both(
    shop: Shop, tiny_base: Path, start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Running, Running]]:
    """On engines, and on torch."""
    monkeypatch.setattr(choice.TensorRTExecutor, "load", lambda *_: shop.executor(tiny_base))
    started = [start(shop.home, "tiny/base", {}, executor=name) for name in ("tensorrt", "torch")]
    yield started[0], started[1]
    for each in started:
        each.service.close()


def with_net(seed: int) -> Request:
    return draw(Adapter(ref="c/net", images=("a",)), seed=seed).model_copy(update={"images": {"a": coarse_png(4, 64)}})


def test_a_net_runs_on_engines_of_its_own(
    both: tuple[Running, Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [with_net(1), draw(seed=2), with_net(3)]
    monkeypatch.setattr("scumble_server.executors.tensorrt.executor.torch_nets", None)
    expected = both[1].run(requests)
    for found, theirs in zip(both[0].run(requests), expected, strict=True):
        assert torch.allclose(found.latents, theirs.latents, atol=1e-3)
    assert (expected[0].latents - both[1].run([draw(seed=1)])[0].latents).abs().max() > 1e-2
    assert "in torch" not in caplog.text


def test_a_net_without_engines_runs_in_torch_and_the_log_says_so(
    both: tuple[Running, Running], shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(shop.engines, shop.net.digest, {})
    found, expected = (running.run([with_net(1)])[0].latents for running in both)
    assert torch.allclose(found, expected, atol=1e-3)
    assert "c/net@1 runs in torch, because it has no engines that fit" in caplog.text


def test_a_checkpoint_runs_on_engines_of_its_own_and_the_bases(both: tuple[Running, Running]) -> None:
    requests = [draw(Adapter(ref="d/tuned")), draw(seed=1)]
    found, expected = both[0].run(requests), both[1].run(requests)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine.latents, theirs.latents, atol=1e-3)
    assert (expected[0].latents - expected[1].latents).abs().max() > 1e-2
    assert found[0].done.receipt.engine["engine unet.guided"] == "sha256:d/tuned"
    assert found[0].done.receipt.engine["engine text_encoder"] == "sha256:tiny/base"


def test_a_checkpoint_without_an_engine_of_what_it_changes_is_refused(
    both: tuple[Running, Running], shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: each for name, each in shop.engines[shop.tuned.digest].items() if name != "kv_projection"}
    monkeypatch.setitem(shop.engines, shop.tuned.digest, some)
    with pytest.raises(
        Refused, match=r"has no engine of kv_projection that fits; run `scumble build engine --base d/tuned@1`"
    ):
        both[0].run([draw(Adapter(ref="d/tuned"))])
    assert both[0].run([draw(seed=2)])[0].latents.isfinite().all()


@pytest.fixture
def rtx_shop(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """With engines of TensorRT for RTX, each in a folder of its own, as in the registry's cache."""
    made: dict[str, dict[str, Pulled]] = {}
    folder = shop.home / "rtx"
    for digest, engines in shop.engines.items():
        for name, engine in engines.items():
            plan = folder / digest.removeprefix("sha256:") / name / "engine.plan"
            plan.parent.mkdir(parents=True)
            plan.write_bytes(engine.plan.read_bytes())
            key = replace(engine.stored.key, flavour=Flavour.TENSORRT_RTX)
            made.setdefault(digest, {})[name] = replace(engine, plan=plan, stored=replace(engine.stored, key=key))
    monkeypatch.setattr(shop, "engines", made)
    yield shop
    shutil.rmtree(folder)


def runtime_caches(shop: Shop, of: Version) -> set[str]:
    """The graphs of which what the GPU compiled is kept for the next start."""
    return {name for name, engine in shop.engines[of.digest].items() if engine.runtime_cache.is_file()}


@pytest.fixture
def on_rtx(
    rtx_shop: Shop, tiny_base: Path, start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Running]]:
    monkeypatch.setattr(choice.TensorRTExecutor, "load", lambda *_: rtx_shop.executor(tiny_base))
    started = []

    def begin(**config: Any) -> Running:
        started.append(start(rtx_shop.home, "tiny/base", {}, executor="tensorrt_rtx", **config))
        return started[-1]

    yield begin
    for each in started:
        each.service.close()


def test_a_server_that_stops_keeps_what_the_gpu_compiled_for_all_its_engines(
    rtx_shop: Shop, on_rtx: Callable[..., Running]
) -> None:
    running = on_rtx()
    running.run([with_net(1), draw(Adapter(ref="d/tuned"))])
    assert runtime_caches(rtx_shop, rtx_shop.base) == set()
    running.service.close()
    assert runtime_caches(rtx_shop, rtx_shop.base) == set(ON_BASE) - {"vae_encoder"}, "no picture was encoded"
    assert runtime_caches(rtx_shop, rtx_shop.net) == {"controlnet", "controlnet_kv", "controlnet_hint"}
    assert runtime_caches(rtx_shop, rtx_shop.tuned) == set(ON_UNET)
    files = {file.name for file in (rtx_shop.home / "rtx").rglob("*") if file.is_file()}
    assert files == {"engine.plan", store.RUNTIME_CACHE}, "nothing half written stays"


def test_a_checkpoint_that_is_evicted_keeps_what_the_gpu_compiled(
    rtx_shop: Shop, on_rtx: Callable[..., Running]
) -> None:
    running = on_rtx()
    running.run([draw(Adapter(ref="d/tuned"))])
    weights = running.service._weights
    with weights.open() as lease:
        lease.get("more", weights._budget - weights.stats().bytes + 1, object)
    assert runtime_caches(rtx_shop, rtx_shop.tuned) == set(ON_UNET)


def test_without_a_gpu_torch_serves_and_the_log_says_why(
    published: tuple[Path, dict[str, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    config = ServerConfig(home=published[0], base="tiny/base", executor="tensorrt_rtx")
    with Registry.open(published[0]) as registry:
        found = choice.load_executor(registry, registry.resolve("tiny/base"), FAMILIES["sd1"], config)
    assert isinstance(found, TorchExecutor)
    assert "tiny/base@1 is served by torch, not by tensorrt_rtx: TensorRT needs a CUDA device" in caplog.text


def publish(registry: Registry, folder: Path, manifest: GraphManifest, **changed: Any) -> StoredEngine:
    version = registry.resolve("tiny/base")
    fields = {
        "part": manifest.graph,
        "graph": "g",
        "base": version.digest,
        "flavour": Flavour.TENSORRT,
        "version": "11",
        "sm": (89,),
        "precision": "fp32",
        "layout": "l",
        "profiles": [],
        "flags": {},
    }
    (folder / "plan").write_bytes(b"plan")
    manifest.write(folder / "manifest.json")
    key = EngineKey(**(fields | changed))
    return store.publish(registry, version, key, folder / "plan", folder / "manifest.json", Report(0, 0, 0, 0, 0))


def test_only_engines_of_this_machine_and_of_these_graphs_are_pulled(
    tiny_base: Path, tmp_path: Path, pulled: dict[str, Pulled], caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(Flavour.TENSORRT, "11", 89)
    config = ServerConfig(home=tmp_path / "home", base="tiny/base")
    manifest = pulled["unet.small"].manifest
    with Registry.open(tmp_path / "home", create=True) as registry:
        version = registry.publish(tiny_base, "tiny/base")
        publish(registry, tmp_path, manifest, sm=(120,))
        publish(registry, tmp_path, manifest.model_copy(update={"code": "older"}))
        with pytest.raises(NotFound, match="tiny/base@1 has no engine for tensorrt 11 on SM89 in fp32"):
            pull_base(registry, version, machine, config)
        assert "is stale" in caplog.text
        fresh = publish(registry, tmp_path, manifest)
        assert manifest.code == code_digest()
        assert pull_base(registry, version, machine, config)["unet.small"].stored == fresh


def test_memory_is_counted_with_the_engines_that_fit_this_machine(
    tiny_base: Path, tmp_path: Path, pulled: dict[str, Pulled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "current_sm", lambda: 89)
    monkeypatch.setattr(fitting, "load", lambda _flavour: SimpleNamespace(__version__="11"))
    config = ServerConfig(home=tmp_path / "home", base="tiny/base", executor="tensorrt")
    with Registry.open(tmp_path / "home", create=True) as registry:
        version = registry.publish(tiny_base, "tiny/base")
        weights = choice.executor_bytes(registry, version, tiny_base, FAMILIES["sd1"], config)
        assert weights == weights_bytes(tiny_base, FAMILIES["sd1"], "fp32"), "torch serves without engines"
        engine = publish(registry, tmp_path, pulled["unet.small"].manifest)
        publish(registry, tmp_path, pulled["vae_decoder"].manifest, sm=(120,))
        found = choice.executor_bytes(registry, version, tiny_base, FAMILIES["sd1"], config)
        assert found == engine.artifact.size


def test_an_engine_that_no_request_needs_is_not_loaded(
    tiny_base: Path, pulled: dict[str, Pulled], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.plan"
    broken.write_bytes(b"no plan")
    made = executor(tiny_base, {**pulled, "unet.every": replace(pulled["unet.small"], plan=broken)})
    made.prepare(frozenset({"factors"}), {"rows": 2})
    with pytest.raises(IntegrityError):
        made.prepare(frozenset({"factors", "full"}), {"rows": 2})


def test_a_missing_engine_is_built_if_the_configuration_says_so(
    tiny_base: Path, tmp_path: Path, pulled: dict[str, Pulled], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    with Registry.open(tmp_path / "home", create=True) as registry:
        version = registry.publish(tiny_base, "tiny/base")

        def build_into(*arguments: Any) -> None:
            asked.append(arguments)
            publish(registry, tmp_path, pulled["unet.small"].manifest)

        monkeypatch.setattr("scumble_build.engines.command.build_into", build_into)
        config = ServerConfig(home=tmp_path / "home", base="tiny/base", build_engines=True)
        found = pull_base(registry, version, Machine(Flavour.TENSORRT, "11", 89), config)
    assert set(found) == {"unet.small"}
    assert asked == [("tiny/base@1", tmp_path / "home", Flavour.TENSORRT, (89,), "fp32")]


def test_a_damaged_engine_is_not_loaded(tiny_base: Path, tmp_path: Path, pulled: dict[str, Pulled]) -> None:
    with Registry.open(tmp_path / "home", create=True) as registry:
        version = registry.publish(tiny_base, "tiny/base")
        stored = publish(registry, tmp_path, pulled["unet.small"].manifest)
        blob = stored.artifact.manifest.files[store.PLAN]
        path = tmp_path / "home/registry/blobs/sha256" / blob.hex[:2] / blob.hex
        path.chmod(0o644)
        path.write_bytes(b"flan")
        config = ServerConfig(home=tmp_path / "home", base="tiny/base")
        with pytest.raises(IntegrityError):
            pull_base(registry, version, Machine(Flavour.TENSORRT, "11", 89), config)
