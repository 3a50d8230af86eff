"""The folders of the embedded registry.

SCUMBLE_HOME/
├── registry/                  all content: back this up
│   ├── registry.db            SQLite: names, versions, aliases, status
│   ├── registry.lock          held while the schema is created or migrated
│   ├── use.lock               shared by all open registries
│   ├── blobs/sha256/ab/ab12…  content-addressed files, read-only
│   └── tmp/                   unfinished blobs, conversions and downloads
└── cache/                     may be deleted at any time
    ├── 3f9c…/                 a version's files as published, named by the version's digest
    ├── onnx/                  exported graphs, without weights
    └── blobs/ab12….safetensors
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def default_home() -> Path:
    """Return `SCUMBLE_HOME`, or `~/.scumble`."""
    return Path(os.environ.get("SCUMBLE_HOME") or Path.home() / ".scumble").expanduser().resolve()


@dataclass(frozen=True, slots=True)
class HomePaths:
    home: Path

    @property
    def root(self) -> Path:
        return self.home / "registry"

    @property
    def database(self) -> Path:
        return self.root / "registry.db"

    @property
    def lock(self) -> Path:
        return self.root / "registry.lock"

    @property
    def lease(self) -> Path:
        return self.root / "use.lock"

    @property
    def scratch(self) -> Path:
        return self.root / "tmp"

    @property
    def cache(self) -> Path:
        return self.home / "cache"
