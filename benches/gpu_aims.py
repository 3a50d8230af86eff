"""The thresholds that `gpu.py` compares its figures with."""

from __future__ import annotations

from typing import Any

RANKS = (16, 64)


def aims(bases: dict[str, Any], traffic: dict[str, float]) -> dict[str, bool]:
    """Compare the figures with thresholds; sections that were left out or failed have no entry."""
    met: dict[str, bool] = {}
    for name, sections in bases.items():
        figures = {section: found for section, found in sections.items() if not {"failed", "left_out"} & found.keys()}
        if "relative_error" in figures.get("correctness", {}):
            met[f"{name}: a mixed step within 2 % of fp32"] = figures["correctness"]["relative_error"] <= 0.02
        if "bare" in figures:
            met[f"{name}: the bare graph at most 1.03x diffusers'"] = figures["bare"]["ratio"] <= 1.03
        for rank in RANKS if "mixed" in figures else ():
            at = figures["mixed"][f"rank_{rank}"]
            met[f"{name}: rank {rank}, 8 sets, 90 % of the bare batch"] = at["of_bare_throughput"] >= 0.9
            met[f"{name}: rank {rank} costs at most 1.5x its arithmetic"] = at["cost"] <= 1.5 * at["arithmetic"]
        if "exported" in figures:
            at = figures["exported"]
            met[f"{name}: the bare graph exported at most 1.03x a plain export"] = at["bare_s"] <= 1.03 * at["plain_s"]
            for rank in RANKS:
                met[f"{name}: rank {rank} exported, 90 % of the bare batch"] = (
                    at["bare_s"] >= 0.9 * at[f"rank_{rank}_s"]
                )
        if "switch" in figures:
            met[f"{name}: a warm switch in 15 ms"] = figures["switch"]["warm_s"] <= 0.015
        if "checkpoint" in figures:
            met[f"{name}: a checkpoint from host memory in 0.5 s"] = figures["checkpoint"]["host_s"] <= 0.5
        if "traffic" in figures:
            at = figures["traffic"]
            met[f"{name}: {traffic[name]:g}x diffusers on mixed traffic"] = at["diffusers_speedup"] >= traffic[name]
            met[f"{name}: 1.5x compiled diffusers with hot-swapped LoRAs"] = at["diffusers_hot_swapped_speedup"] >= 1.5
    return met


def aims_of_kinds(kinds: dict[str, Any]) -> dict[str, bool]:
    """Compare the pictures of all kinds."""
    if "failed" in kinds:
        return {}
    differences = [value for way in kinds.values() for value in way.values()]
    return {"every kind within 4 of 255 of the CPU": all(isinstance(d, int) and d <= 4 for d in differences)}
