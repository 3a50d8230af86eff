"""Refuses links in README.md and docs/ that lead nowhere, and pages that no link leads to."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

START = Path("README.md")
WEB = ("http://", "https://", "mailto:")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[Path]:
    """Files that `page` points at, relative to the repository; web addresses and headings are left out."""
    targets = [target.partition("#")[0] for target in LINK.findall(CODE.sub("", page.read_text()))]
    return [Path(os.path.normpath(page.parent / target)) for target in targets if target and not target.startswith(WEB)]


def main() -> int:
    problems: list[str] = []
    read: set[Path] = set()
    waiting = [START]
    while waiting:
        page = waiting.pop()
        if page in read:
            continue
        read.add(page)
        for target in links(page):
            if not target.exists():
                problems.append(f"{page}: {target} does not exist")
            elif target.suffix == ".md":
                waiting.append(target)
    unread = sorted(set(Path("docs").rglob("*.md")) - read)
    problems += [f"{page}: no link leads here from {START}" for page in unread]
    for page in unread:
        problems += [f"{page}: {target} does not exist" for target in links(page) if not target.exists()]
    print(*problems, sep="\n", end="\n" if problems else "")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
