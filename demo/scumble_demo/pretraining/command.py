"""`scumble train base`: trains the bundled base, writes its folder and measures it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scumble.errors import InvalidRequest, NotFound
from scumble_demo.emoji.home import data_home

if TYPE_CHECKING:
    from scumble_demo.pretraining.evaluate import Evaluation
    from scumble_demo.pretraining.stages import Workshop

STAGES = ("data", "vae", "clip", "unet", "scorer")


def train_base(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the base to write or to measure.")] = Path(
        "demo/base"
    ),
    stage: Annotated[str, typer.Option("--stage", help="data, vae, clip, unet, scorer or all.")] = "all",
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Cache folder for npm packages.")] = None,
    work_dir: Annotated[Path | None, typer.Option("--work-dir", help="Pictures, checkpoints, logs, grids.")] = None,
    vae_steps: Annotated[int | None, typer.Option("--vae-steps", min=1)] = None,
    clip_steps: Annotated[int | None, typer.Option("--clip-steps", min=1)] = None,
    unet_steps: Annotated[int | None, typer.Option("--unet-steps", min=1)] = None,
    scorer_steps: Annotated[int | None, typer.Option("--scorer-steps", min=1)] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of all random numbers.")] = 1,
    number: Annotated[int, typer.Option("--workers", min=1, help="Number of processes, on a CPU.")] = 2,
    resume_from: Annotated[
        Path | None, typer.Option("--resume-from", help="Folder of a base whose weights to start from.")
    ] = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Only measure the base in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train the bundled base: pictures, autoencoder, CLIP, UNet. Continues an earlier run."""
    if stage not in (*STAGES, "all"):
        raise InvalidRequest(f"--stage is {stage!r}; it is one of {', '.join(STAGES)}, all", field="stage")
    from scumble_demo.pretraining import workers
    from scumble_demo.pretraining.device import best_device
    from scumble_demo.pretraining.recipe import Recipe
    from scumble_demo.pretraining.stages import Workshop, prepare_data

    if resume_from and not (resume_from / "model_index.json").is_file():
        raise NotFound(f"{resume_from} has no base to start from", path=str(resume_from))
    device, begun = best_device(), time.monotonic()
    recipe = Recipe(seed=seed).with_steps(vae=vae_steps, clip=clip_steps, unet=unet_steps, scorer=scorer_steps)
    folder = work_dir or data_home() / ("base" if resume_from is None else "base-resumed")
    shop = Workshop(folder, recipe, device, resume_from)
    wanted = () if evaluate or stage == "data" else STAGES[1:] if stage == "all" else (stage,)
    prepare_data(shop, data_dir or data_home() / "npm")
    if wanted and device.type == "cpu" and not workers.is_worker():
        workers.launch_workers(number, "scumble_demo.pretraining", sys.argv[sys.argv.index("base") + 1 :])
    workers.join_workers()
    report: dict[str, object] = {"stages": _run(shop, wanted), "pictures": str(folder / "gallery")}
    if workers.rank() > 0:
        return
    if stage in ("unet", "scorer", "all") and not evaluate:
        _export(shop, out)
    if evaluate or stage == "all":
        evaluation = _evaluate(shop, out)
        report |= {"base": str(out), "evaluation": asdict(evaluation), "passed": evaluation.passed}
    _report({**report, "seconds": round(time.monotonic() - begun)}, as_json=as_json)
    if evaluate and not report["passed"]:
        raise typer.Exit(1)


def _run(shop: Workshop, wanted: tuple[str, ...]) -> dict[str, dict[str, float]]:
    from scumble_demo.pretraining import workers
    from scumble_demo.pretraining.stages import tokenizer_of, train_clip, train_scorer, train_unet, train_vae

    trained: dict[str, Callable[[Workshop], dict[str, float]]] = {
        "vae": train_vae,
        "clip": train_clip,
        "unet": train_unet,
        "scorer": train_scorer,
    }
    if wanted and workers.rank() == 0:
        tokenizer_of(shop)
    workers.wait_for_all()
    return {name: trained[name](shop) for name in wanted}


def _export(shop: Workshop, out: Path) -> None:
    from scumble_demo.pretraining.export import export_base
    from scumble_demo.pretraining.stages import trained_parts

    export_base(out, trained_parts(shop))


def _evaluate(shop: Workshop, out: Path) -> Evaluation:
    from scumble_demo.pretraining.evaluate import evaluate_base

    return evaluate_base(out, shop.gallery(), shop.device, grid=shop.folder / "evaluation.png")


def _report(report: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    evaluation = report.get("evaluation")
    if isinstance(evaluation, dict):
        for name, value in evaluation.items():
            print(f"{name:20} {value:.1%}" if isinstance(value, float) else f"{name:20} {value}")
        print("good enough" if report["passed"] else "below the thresholds")
    else:
        print(json.dumps(report, indent=2))
