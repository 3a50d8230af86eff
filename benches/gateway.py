"""Measures what the gateway adds to direct gRPC, and what it holds for streams that wait. Prints JSON.

    python benches/gateway.py http://127.0.0.1:8080 127.0.0.1:8001

against a running server (`scumble serve`), which should have nothing else to do. Requests take one step, so that little
else is measured: pictures of one step over HTTP and over gRPC in turn; 200 requests at once; streams that wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil

from scumble import Client

ASKED: dict[str, Any] = {
    "prompt": "x",
    "steps": 1,
    "width": 64,
    "height": 64,
    "guidance_scale": 1.0,
    "options": {"format": "png"},
}
ROUNDS = 40
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gateway")
    parser.add_argument("grpc")
    parser.add_argument("--streams", type=int, default=200, help="that wait at once, below the server's --max-queue")
    parser.add_argument("--pid", type=int, help="of the gateway, whose memory is measured")
    arguments = parser.parse_args()
    report = {
        "one": one_at_a_time(arguments.gateway, arguments.grpc),
        "at_once": asyncio.run(at_once(arguments.gateway, 200)),
        "waiting": asyncio.run(waiting(arguments.gateway, arguments.streams, arguments.pid)),
    }
    print(json.dumps(report, indent=2))


def one_at_a_time(gateway: str, grpc: str) -> dict[str, float]:
    """Milliseconds of each way, in turn, so that a slow moment meets both."""
    with Client(grpc) as client, httpx.Client(base_url=gateway, timeout=60) as web:
        ways: dict[str, Callable[[], object]] = {
            "grpc": lambda: client.images.generate(**ASKED),
            "gateway": lambda: web.post("/v1/generate", json=ASKED).raise_for_status(),
        }
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(WARM_UP + ROUNDS):
            for name, draw in ways.items():
                start = time.perf_counter()
                draw()
                spent[name].append(1e3 * (time.perf_counter() - start))
    differences = [b - a for a, b in zip(spent["grpc"], spent["gateway"], strict=True)][WARM_UP:]
    medians = {f"{name}_p50_ms": statistics.median(each[WARM_UP:]) for name, each in spent.items()}
    return {**medians, "added_p50_ms": statistics.median(differences)}


async def at_once(gateway: str, count: int) -> dict[str, float]:
    async with _many(gateway) as web:
        start = time.perf_counter()
        answers = await asyncio.gather(*(web.post("/v1/generate", json={**ASKED, "seed": n}) for n in range(count)))
        seconds = time.perf_counter() - start
    return {"requests": count, "drawn": sum(each.status_code == 200 for each in answers), "seconds": seconds}


async def waiting(gateway: str, count: int, pid: int | None) -> dict[str, float]:
    """Memory of the gateway for each stream that is open, and how long a health check takes beside them."""
    process = psutil.Process(pid) if pid is not None else None
    before = process.memory_info().rss if process else 0
    asked = {**ASKED, "steps": 900, "width": 512, "height": 512}

    async def listen(web: httpx.AsyncClient) -> None:
        async with web.stream("POST", "/v1/generate", json=asked, headers={"Accept": "text/event-stream"}) as answer:
            async for _ in answer.aiter_raw():
                pass

    async with _many(gateway) as web:
        streams = [asyncio.create_task(listen(web)) for _ in range(count)]
        await asyncio.sleep(10)
        start = time.perf_counter()
        (await web.get("/healthz")).raise_for_status()
        health = 1e3 * (time.perf_counter() - start)
        held = (process.memory_info().rss - before) / count if process else 0.0
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return {"streams": count, "health_ms": health, **({"bytes_per_stream": held} if process else {})}


def _many(gateway: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=gateway, timeout=600, limits=httpx.Limits(max_connections=2000))


if __name__ == "__main__":
    main()
