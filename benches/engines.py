"""Measures building TensorRT for RTX engines of real sizes with random weights, on a machine without a GPU.

Every graph is exported and built in its own process, whose largest resident size is the peak. For a graph that does not
fit into memory, the need is estimated from its weights and the other builds. Prints JSON, or with `--table` the table
of docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from measure import machine
from memory import FAMILIES, FULL_VAE, FamilyConfigs
from transformers import CLIPTextConfig
from transformers.initialization import no_init_weights

from scumble.errors import ScumbleError
from scumble_build.engines import profiles
from scumble_build.engines.api import Flavour
from scumble_build.engines.base import BuildTarget, build_graphs, read_manifests
from scumble_build.export.control import NetGraphs
from scumble_build.export.denoiser import GRAPHS
from scumble_build.export.plan import BaseGraphs
from scumble_build.export.write import Exportable, write_graphs
from scumble_build.graphs.families import FAMILIES as OURS
from scumble_build.graphs.models import Models

NAMES = {"sd1.5": "sd1", "sd2.1": "sd2", "sdxl": "sdxl"}
BASE_GRAPHS = ("kv_projection", *(f"unet.{name}" for name in GRAPHS), "vae_decoder", "vae_encoder")
NET_GRAPHS = ("controlnet", "controlnet_kv", "controlnet_hint")
GIB = 1 << 30
NO_BASE = "sha256:" + "0" * 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="sd1.5")
    parser.add_argument("--graph", action="append", help="may be repeated [default: all]")
    parser.add_argument("--sm", type=int, action="append")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--table", action="store_true", help="Markdown instead of JSON")
    parser.add_argument("--work", type=Path, help="Folder for graphs and plans [default: a temporary one]")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="scumble-engines-"))
    xl = arguments.family == "sdxl"
    texts, more = (["text_encoder", "text_encoder_2"], ["controlnet_condition"]) if xl else (["text_encoder"], [])
    graphs = arguments.graph or [*texts, *BASE_GRAPHS, *NET_GRAPHS, *more]
    rows = []
    try:
        for graph in graphs:
            print(f"{graph} …", flush=True, file=sys.stderr)
            row = measured(arguments.family, graph, tuple(arguments.sm or (89,)), arguments.profile, work)
            rows.append(row)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    reckon(rows)
    report = {"machine": machine(), "family": arguments.family, "sm": arguments.sm or [89], "engines": rows}
    print(table(rows) if arguments.table else json.dumps(report, indent=2))


def measured(family: str, graph: str, sm: tuple[int, ...], profile: Path | None, work: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"graph": graph}
    try:
        row |= alone(export, family, graph, work)
        row |= alone(engine, graph, sm, profile, work)
    except BrokenProcessPool:
        row["failed"] = "the process was killed: memory ran out"
    except ScumbleError as error:
        row["failed"] = error.message
    return row


def alone(work: Any, *arguments: Any) -> dict[str, Any]:
    """Run `work` in its own process, so that its peak is separate and nothing else ends if it is killed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        result: dict[str, Any] = pool.submit(work, *arguments).result()
    return result


def export(family: str, graph: str, work: Path) -> dict[str, Any]:
    start = time.monotonic()
    graphs: Exportable
    if graph.startswith("controlnet"):
        graphs = NetGraphs.of(random_net(FAMILIES[family]), "fp16")
    else:
        graphs = BaseGraphs.of(random_models(FAMILIES[family], family), OURS[NAMES[family]], "fp16")  # type: ignore[index]
    (manifest,) = write_graphs(graphs, [graph], work, base=NO_BASE, family=NAMES[family])  # type: ignore[arg-type]
    return {
        "weights_bytes": manifest.weights.size,
        "onnx_bytes": manifest.onnx.size,
        "export_seconds": round(time.monotonic() - start, 1),
        "export_peak_bytes": peak(),
    }


def engine(graph: str, sm: tuple[int, ...], profile: Path | None, work: Path) -> dict[str, Any]:
    wanted = profiles.read(profile) if profile is not None else ()
    target = BuildTarget(Flavour.TENSORRT_RTX, sm, "fp16", wanted)
    start = time.process_time()
    (built,) = build_graphs(work, read_manifests(work, [graph]), target, work / "plans")
    assert built.report is not None
    report = built.report.to_dict()
    report.pop("warnings")
    built.plan.unlink()
    return {**report, "cpu_seconds": round(time.process_time() - start, 1), "peak_bytes": peak()}


def random_models(family: FamilyConfigs, name: str) -> Models:
    """Make the models in fp16; only shapes matter, so weights are drawn by the fastest method without NaN."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=family.latents, **family.unet)
        vae = AutoencoderKL(**FULL_VAE, force_upcast=name == "sdxl")
    with no_init_weights():
        texts = [kind(CLIPTextConfig(**config, max_position_embeddings=77)) for kind, config in family.texts]
    texts = [filled(text) for text in texts]
    torch.set_default_dtype(torch.float32)
    unet, vae = (filled(model.to_empty(device="cpu")) for model in (unet, vae))
    vae = vae.float() if name == "sdxl" else vae
    encoders = [part.encoder for part in OURS[NAMES[name]].texts]  # type: ignore[index]
    return Models(unet, dict(zip(encoders, texts, strict=True)), vae)  # type: ignore[arg-type]


def random_net(family: FamilyConfigs) -> ControlNetModel:
    torch.set_default_dtype(torch.float16)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=family.latents, **family.unet)
        net = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    torch.set_default_dtype(torch.float32)
    model: ControlNetModel = filled(net.to_empty(device="cpu"))
    return model


@torch.no_grad()
def filled(model: Any) -> Any:
    """Fill all tensors with different values: TensorRT stores equal weights once, and a plan would be too small."""
    noise = torch.randn(1 << 20).half() * 0.02
    offset = 0
    for tensor in filter(torch.is_floating_point, (*model.parameters(), *model.buffers())):
        flat = tensor.view(-1)
        start = 0
        while start < flat.numel():
            count = min(flat.numel() - start, len(noise) - offset)
            flat[start : start + count] = noise[offset : offset + count]
            start, offset = start + count, (offset + count + 1) % len(noise)
    return model


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reckon(rows: list[dict[str, Any]]) -> None:
    """Estimate the memory of failed builds by the largest ratio of peak to weights among the others."""
    done = [row["peak_bytes"] / row["weights_bytes"] for row in rows if "peak_bytes" in row]
    for row in rows:
        if "failed" in row and done and "weights_bytes" in row:
            row["would_need_bytes"] = int(max(done) * row["weights_bytes"])


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| graph | weights | export | build | CPU | plan | peak of the build |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        weights = f"{row.get('weights_bytes', 0) / GIB:.2f} GiB"
        if "failed" in row:
            needs = row.get("would_need_bytes")
            more = f"; it would need about {needs / GIB:.0f} GiB" if needs else ""
            lines.append(f"| `{row['graph']}` | {weights} | | | | | {row['failed']}{more} |")
            continue
        build = row["parse_seconds"] + row["build_seconds"]
        cells = (weights, f"{row['export_seconds']:.0f} s", f"{build:.0f} s", f"{row['cpu_seconds']:.0f} s")
        sizes = (f"{row['plan_bytes'] / GIB:.2f} GiB", f"{row['peak_bytes'] / GIB:.1f} GiB")
        lines.append(f"| `{row['graph']}` | {' | '.join((*cells, *sizes))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
