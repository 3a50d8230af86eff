"""Exports the loop's counters on Triton's metrics port. Each call into Triton is a message between processes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import triton_python_backend_utils as pb_utils

from scumble.stats import Stats

INTERVAL = 1.0
COUNTERS = {
    "requests": "Requests accepted",
    "images": "Images finished",
    "failed": "Requests that ended without an image",
    "steps": "Steps of the loop, each for a batch of rows",
    "rows": "Rows computed, one or two per image and step",
    "mixed_steps": "Steps in which rows with different adapters shared the batch",
    "failed_steps": "Steps that failed and were repeated image by image",
}
GAUGES = {
    "open_requests": "Requests that are queued or running",
}


class LoopMetrics:
    """Owns a thread that copies changed counters from `read()` to Prometheus once a second."""

    def __init__(self, read: Callable[[], Stats]) -> None:
        self._read = read
        self._counters = {name: _Metric(f"scumble_{name}_total", text, "COUNTER") for name, text in COUNTERS.items()}
        self._gauges = {name: _Metric(f"scumble_{name}", text, "GAUGE") for name, text in GAUGES.items()}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. Triton's metrics must be deleted before the model is unloaded."""
        self._ended.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            stats = self._read()
            for name, metric in (self._counters | self._gauges).items():
                metric.set(float(getattr(stats, name)))


class _Metric:
    def __init__(self, name: str, description: str, kind: str) -> None:
        self._is_counter = kind == "COUNTER"
        self._family = pb_utils.MetricFamily(name, description, getattr(pb_utils.MetricFamily, kind))
        self._metric = self._family.Metric(labels={})
        self._exported = 0.0

    def set(self, value: float) -> None:
        if value == self._exported:
            return
        if self._is_counter:
            self._metric.increment(value - self._exported)
        else:
            self._metric.set(value)
        self._exported = value
