"""The model card: README.md beside the adapter, with the front matter that model hubs read."""

from __future__ import annotations

import json
from pathlib import Path

from scumble_registry.results import CARD, GRID, Result


def write_card(out: Path, result: Result, *, base: str | None) -> None:
    """Write `out/README.md` from the result; `base` is the base's reference, if it has one."""
    provenance = result.provenance
    base = base or str(provenance["parent"])
    matter = {
        "library_name": "diffusers",
        "license": result.license or "unknown",
        "base_model": base,
        "tags": ["text-to-image", str(provenance["trainer"])],
        "instance_prompt": result.trigger_words[0] if result.trigger_words else None,
    }
    front = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in matter.items() if value)
    libraries = ", ".join(f"{name} {version}" for name, version in provenance["libraries"].items())
    config = json.dumps(provenance["config"], indent=2, ensure_ascii=False)
    metrics = json.dumps(result.metrics, indent=2, ensure_ascii=False)
    (out / CARD).write_text(
        f"""---
{front}
---

# {result.description or f"{provenance['trainer']} for {base}"}

Trained by `scumble train {provenance["trainer"]}` for {base}.

- Trigger words: {", ".join(result.trigger_words) or "none"}
- License: {result.license or "not given"}
- Data: {provenance["pictures"]} pictures, {provenance["data_digest"]}
- Cost: {provenance["time"]:.0f} s, {provenance["peak_memory"] / 2**20:.0f} MiB, on {provenance["device"]}
- Made with: {libraries}

![Fixed prompts and seeds; the first column is the base]({GRID})

## Metrics

```json
{metrics}
```

## Configuration

```json
{config}
```
""",
        "utf-8",
    )
