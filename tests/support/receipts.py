"""A receipt and stats as a server makes them, for tests that have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scumble.receipt import Receipt
from scumble.stats import Stats

BASE, INK = "sha256:" + "b" * 64, "sha256:" + "1" * 64


GOLDEN = Path(__file__).parents[1] / "unit/client/receipt.json"


def golden_receipt() -> str:
    """A server's receipt, of every kind of adapter and input, byte for byte as it wrote it."""
    return GOLDEN.read_text().strip()


def receipt_json(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "request": {
            "prompt": "a red apple",
            "negative_prompt": None,
            "base": "scumble/demo@prod",
            "scheduler": "ddim",
            "seed": 5,
            "steps": 20,
            "width": 128,
            "height": 64,
            "num_images": 3,
            "guidance_scale": 5.5,
            "adapters": [
                {"ref": "styles/ink", "weight": 0.8, "text_weight": None, "start": 0.25},
                {"ref": "styles/none", "weight": 0.0, "text_weight": None},
            ],
            "options": {},
        },
        "base": {"name": "scumble/demo", "version": 1, "digest": BASE, "ref": "scumble/demo@prod"},
        "adapters": [
            {
                "name": "styles/ink",
                "version": 2,
                "digest": INK,
                "ref": "styles/ink",
                "kind": "lora",
                "weight": 0.8,
                "text_weight": 0.8,
                "rank": 4,
            }
        ],
        "dropped": [{"ref": "styles/none", "reason": "weight 0"}],
        "seeds": [5, 6, 7],
        "engine": {"executor": "torch"},
        "timings_ms": {"total": 12.5},
        **changes,
    }


def a_receipt(**changes: Any) -> Receipt:
    return Receipt.parse(receipt_json(**changes))


def a_receipt_of(**asked: Any) -> Receipt:
    """With these fields of its request changed."""
    return a_receipt(request=receipt_json()["request"] | asked)


def some_stats(**changes: Any) -> Stats:
    cache = dict.fromkeys(("entries", "bytes", "held_bytes", "budget", "hits", "misses", "evictions", "waits"), 0)
    counted = ("requests", "images", "failed", "steps", "rows", "mixed_steps", "failed_steps", "out_of_memory")
    stats = {
        **dict.fromkeys(counted, 0),
        "batch_sizes": {},
        "step_seconds": 0.0,
        "open_requests": 0,
        "base": "scumble/demo@1",
        "bases": ["scumble/demo@1"],
        **dict.fromkeys(("host_cache", "device_cache", "weights_cache"), cache),
        "alive": True,
    }
    return Stats.model_validate(stats | changes)
