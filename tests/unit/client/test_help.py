"""`--help` of every command, real ones, imports nothing that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("torch", "transformers", "diffusers", "accelerate", "onnx", "onnxruntime", "peft", "cv2", "scipy")

WALK = f"""
import contextlib, io, json, sys
import typer
from typer.main import get_command
from importlib.metadata import entry_points
from scumble import cli

seen = []

def visit(command, path):
    context = typer.Context(command, info_name=path[-1])
    command.get_help(context)
    seen.append([" ".join(path), [name for name in {HEAVY!r} if name in sys.modules]])
    for name, sub in getattr(command, "commands", {{}}).items():
        visit(sub, [*path, name])

for entry in entry_points(group=cli.GROUP):
    root = get_command(cli.build_app(entry.name))
    visit(root.commands[entry.name], [entry.name])
print(json.dumps(seen))
"""


def test_no_help_imports_torch_or_its_like() -> None:
    done = subprocess.run([sys.executable, "-c", WALK], capture_output=True, text=True, check=True)
    seen = dict(json.loads(done.stdout.splitlines()[-1]))
    assert {"build engine", "build export", "demo", "generate", "registry publish", "serve", "train lora"} <= set(seen)
    assert {path: heavy for path, heavy in seen.items() if heavy} == {}
