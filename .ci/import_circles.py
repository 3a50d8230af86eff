"""Refuses modules of one package that import each other in a circle; imports for types alone do not count."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import grimp


def circles(package: str) -> list[list[str]]:
    """Every set of modules of which each reaches each other, sorted."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=True)
    components = {
        frozenset({module, *(graph.find_upstream_modules(module) & graph.find_downstream_modules(module))})
        for module in graph.modules
    }
    return sorted(sorted(component) for component in components if len(component) > 1)


def main() -> int:
    config = tomllib.loads(Path("pyproject.toml").read_text())
    bad = [circle for package in config["tool"]["importlinter"]["root_packages"] for circle in circles(package)]
    for circle in bad:
        print(f"import circle of {len(circle)} modules:", *circle, sep="\n  ")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
