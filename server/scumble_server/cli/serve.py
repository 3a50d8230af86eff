"""`scumble serve`. torch is imported by the server's own process alone."""

from __future__ import annotations

import json
import logging
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from scumble.errors import InvalidRequest
from scumble_gateway.running import listen, running_gateway
from scumble_registry import default_home
from scumble_server.config import ExecutorName, ServerConfig, default_executor
from scumble_server.logs import LogFormat
from scumble_server.triton.launcher import Ports
from scumble_server.triton.running import LOOPBACK, RunningServer, running_server

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "fp16", "bf16"]
PARENT_INTERVAL = 0.5
GIB = 1 << 30


def serve(
    base: Annotated[
        list[str] | None,
        typer.Option(help="Base to serve, once for each; the first answers requests which name none. [scumble/demo]"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = LOOPBACK,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8002,
    health_port: Annotated[int, typer.Option(min=0, max=65535, help="/healthz and /readyz. 0: any free one.")] = 8081,
    gateway_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The gateway's, HTTP on this machine. 0: any free one.")
    ] = 8080,
    with_gateway: Annotated[bool, typer.Option("--gateway/--no-gateway", help="Start the gateway, too.")] = True,
    triton_http: Annotated[
        bool, typer.Option("--triton-http", help="Turn on Triton's own HTTP, for trusted callers only.")
    ] = False,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="Of Triton's own HTTP. 0: any free one.")] = 8000,
    expose_vulnerable_triton: Annotated[
        bool,
        typer.Option(
            "--expose-vulnerable-triton",
            help="Listen beyond this machine although this Triton has published holes: anyone who reaches it can end "
            "the server, or run code in it.",
        ),
    ] = False,
    executor: Annotated[
        ExecutorName | None, typer.Option(help="What runs the graphs. [SCUMBLE_EXECUTOR, else torch]")
    ] = None,
    build_engines: Annotated[
        bool, typer.Option("--build-engines", help="Build TensorRT engines that are missing before serving.")
    ] = False,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = "cpu",
    precision: Annotated[Precision, typer.Option(help="Numbers that the denoiser computes with.")] = "fp32",
    cuda_graphs: Annotated[bool, typer.Option(help="Capture steps as CUDA graphs.")] = True,
    compile_steps: Annotated[
        bool, typer.Option("--compile", help="Compile the denoiser by torch.compile (executor torch).")
    ] = False,
    png_level: Annotated[int, typer.Option(min=0, max=9, help="Compression of PNGs: higher is smaller, slower.")] = 1,
    fused_lora: Annotated[
        bool | None,
        typer.Option("--fused-lora/--no-fused-lora", help="Add LoRAs with the fused kernel. [on CUDA, with triton]"),
    ] = None,
    max_batch_images: Annotated[int, typer.Option(min=1, max=64, help="Images that share a step.")] = 8,
    max_queue: Annotated[int, typer.Option(min=1, help="Open requests; more are refused.")] = 256,
    host_cache: Annotated[float, typer.Option(min=0.001, help="GiB of host memory for adapters.")] = 1.0,
    device_cache: Annotated[float, typer.Option(min=0.001, help="GiB of device memory for requests.")] = 2.0,
    weights_cache: Annotated[
        float, typer.Option(min=0.001, help="GiB of device memory for bases, checkpoints.")
    ] = 16.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the model.")] = None,
    home: Annotated[Path | None, typer.Option(help="Registry, caches and logs. [SCUMBLE_HOME]")] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Lines of the log.")] = "text",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Put prompts into the log.")] = False,
    triton: Annotated[Path | None, typer.Option(help="tritonserver to run. [SCUMBLE_TRITON]")] = None,
    start_timeout: Annotated[
        float | None,
        typer.Option(
            min=1, help="Seconds until it must be ready. [600; 7200 with --compile; a day with --build-engines]"
        ),
    ] = None,
    exit_with_parent: Annotated[bool, typer.Option(help="Stop when the starting process ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON once ready.")] = False,
) -> None:
    """Start the server and keep it running until Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if compile_steps and fused_lora:
        raise InvalidRequest(
            "--fused-lora: compiled steps do not use the kernel; leave it or --compile out", field="fused_lora"
        )
    bases = base or ["scumble/demo"]
    config = ServerConfig(
        home=home.expanduser().resolve() if home else default_home(),
        base=bases[0],
        more_bases=tuple(bases[1:]),
        executor=executor or default_executor(),
        build_engines=build_engines,
        device=device,
        precision=precision,
        cuda_graphs=cuda_graphs,
        compile_steps=compile_steps,
        png_level=png_level,
        fused_lora=fused_lora,
        max_batch_images=max_batch_images,
        max_queue=max_queue,
        host_cache_bytes=int(host_cache * GIB),
        device_cache_bytes=int(device_cache * GIB),
        weights_cache_bytes=int(weights_cache * GIB),
        threads=threads,
        log_format=log_format,
        log_prompts=log_prompts,
    )
    ports = Ports(grpc_port, metrics_port, health_port, http_port if triton_http else None)
    parent = os.getppid() if exit_with_parent else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    try:
        with ExitStack() as stack:
            front = listen(LOOPBACK, gateway_port) if with_gateway else None  # before anything is started
            server = stack.enter_context(
                running_server(
                    config,
                    host=host,
                    ports=ports,
                    triton=triton,
                    start_timeout=start_timeout,
                    expose_vulnerable_triton=expose_vulnerable_triton,
                )
            )
            address = stack.enter_context(running_gateway(server.grpc_url, front)) if front is not None else None
            print(_describe(server, address, as_json=as_json), flush=True)
            _wait(server, parent)
    except KeyboardInterrupt:
        pass


def _wait(server: RunningServer, parent: int | None) -> None:
    while parent is None or os.getppid() == parent:
        server.wait(PARENT_INTERVAL)


def _describe(server: RunningServer, gateway: str | None, *, as_json: bool) -> str:
    places = {
        **({"gateway": gateway} if gateway else {}),
        "grpc": server.grpc_url,
        **({"http": server.http_url} if server.http_url else {}),
        "metrics": server.metrics_url,
        "health": server.health_url,
        "log": str(server.log),
        "pid": os.getpid(),
    }
    if as_json:
        return json.dumps({"ready": True, **places})
    lines = [f"  {name:8} {place}" for name, place in places.items() if name != "pid"]
    return "\n".join(["Scumble is ready. Ctrl-C stops it.", *lines])
