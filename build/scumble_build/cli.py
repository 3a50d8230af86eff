"""`scumble build …`: export a base's graphs to ONNX and build TensorRT engines."""

from __future__ import annotations

import typer

from scumble_build.engines.command import engine, engines, pull
from scumble_build.export.command import export

app = typer.Typer(no_args_is_help=True, help="Export a base's graphs to ONNX, and build TensorRT engines of them.")


@app.callback()
def build() -> None:
    """Export a base's graphs and build engines from them."""


app.command("export")(export)
app.command("engine")(engine)
app.command("engines")(engines)
app.command("pull")(pull)
