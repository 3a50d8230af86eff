"""`scumble train METHOD`: trains an adapter and publishes it. Options, base and data are checked before torch is
imported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from scumble.errors import InvalidRequest
from scumble.files import explain_os_errors, private_folder
from scumble_trainers.methods import MethodEntry
from scumble_trainers.options import Common, command_of
from scumble_trainers.settings import TrainSettings, parse_settings, read_config

if TYPE_CHECKING:
    from scumble_registry.results import Result


def method_command(entry: MethodEntry) -> Callable[..., None]:
    """Make the subcommand of one method, for typer."""
    return command_of(entry.settings, partial(_run, entry), entry.help)


def _run(entry: MethodEntry, common: Common, given: dict[str, Any]) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns about picture libraries that are not used here
    settings = _settings(entry, common["config"], given)
    _check_names(common)
    summary = train_and_publish(entry, common, settings)
    if summary is not None:
        typer.echo(json.dumps(summary, ensure_ascii=False) if common["as_json"] else _as_text(summary))


def _settings(entry: MethodEntry, config: Path | None, given: dict[str, Any]) -> TrainSettings:
    """Merge options: the command line's, then --config's, then the defaults."""
    from_file = {} if config is None else read_config(config, entry.settings)
    return parse_settings(entry.settings, from_file | given)


def _check_names(common: Common) -> None:
    from scumble_registry.references import parse_alias, parse_name

    publish, alias = common["publish"], common["alias"]
    if publish is None and common["out"] is None:
        raise InvalidRequest("no place for the result: pass --publish ns/name, --out FOLDER or both", field="out")
    if publish is None and (alias or common["staged"]):
        raise InvalidRequest("--alias and --staged need --publish ns/name", field="publish")
    if publish is not None:
        parse_name(publish)
    if alias is not None:
        parse_alias(alias)


def train_and_publish(entry: MethodEntry, common: Common, settings: TrainSettings) -> dict[str, Any] | None:
    """Train, evaluate and publish. Returns what `--json` prints, or None in all processes but the first."""
    from scumble_registry import Registry, default_home
    from scumble_registry.results import publish_result
    from scumble_trainers.base import identify_base, locate_base
    from scumble_trainers.data.checking import check_data
    from scumble_trainers.interrupted import explain_how_to_go_on
    from scumble_trainers.processes import is_first_process
    from scumble_trainers.progress import progress

    home, publish = default_home(), common["publish"]
    located = locate_base(common["base"], home)
    data = check_data(located.folder, common["data"], settings)
    for warning in settings.warnings(data.examples) if is_first_process() else ():
        print(f"scumble: {warning}", file=sys.stderr)
    base = identify_base(located, home)
    out = common["out"]
    if out is None:
        out = default_out(home, entry.name, publish)
        with explain_os_errors(home):
            private_folder(home)  # there is none yet if nothing was published

    with explain_how_to_go_on(out, sys.argv):
        from accelerate import PartialState  # type: ignore[import-untyped]

        from scumble_trainers.evaluation import installed_evaluation
        from scumble_trainers.run import train

        evaluation = installed_evaluation() if common["evaluate"] else None
        if evaluation is not None:
            evaluation.check_measurable(base)
        with progress(wanted=not common["as_json"]) as report:
            result = train(entry.load(), base, data, out, settings, fresh=common["fresh"], report=report)
    if not PartialState().is_main_process:
        return None
    if evaluation is not None:
        result = evaluation.measure(entry.name, base, common["data"], out, result)
    summary = _summary(out, result)
    if publish is None:
        return summary
    with Registry.open(home, create=True) as registry:
        version = publish_result(registry, out, publish, base=base.ref, alias=common["alias"], staged=common["staged"])
    return {**summary, "ref": version.ref, "digest": version.digest}


def default_out(home: Path, method: str, name: str) -> Path:
    """Return the default folder of a run that is published as `ns/name`."""
    return home / "train" / method / name


def _summary(out: Path, result: Result) -> dict[str, Any]:
    return {"out": str(out), **asdict(result), "adapter": str(out / result.adapter)}


def _as_text(summary: dict[str, Any]) -> str:
    """Format the result as text."""
    before, after = summary["metrics"]["before"], summary["metrics"]["after"]
    lines = [f"{name.replace('_', ' ')}: {before[name]:.4f} → {after[name]:.4f}" for name in after]
    lines += [f"{name.replace('_', ' ')}: {value}" for name, value in summary["metrics"].get("effect", {}).items()]
    cost = summary["provenance"]
    lines.append(f"{cost['time']:.0f} s, {cost['peak_memory'] / 2**20:.0f} MiB, on {cost['device']}")
    lines.append(
        f"published as {summary['ref']} ({summary['digest']})" if "ref" in summary else f"saved as {summary['adapter']}"
    )
    lines.append(f"sample grid: {summary['out']}/sample_grid.png")
    return "\n".join(lines)
