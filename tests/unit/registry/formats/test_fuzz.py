"""A few hundred mutated files in every run; `make fuzz` makes ten thousand, and coverage-guided ones."""

from __future__ import annotations

import json
import subprocess
import sys

from support.places import REPOSITORY


def test_mutated_files_are_refused_or_read_as_others_read_them() -> None:
    environment = {"PYTHONPATH": str(REPOSITORY / "tests")}
    command = [sys.executable, "-W", "ignore", "tests/support/fuzz_incoming.py", "--files", "400", "--seed", "1"]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["files"] == 400
    assert said["accepted, as others read it"] > 20  # else nothing was compared
