"""Checks in a fresh process: each costs seconds of imports, so one process takes many jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run_python(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """What `python *arguments` prints, this repository's tests and benchmarks at hand; fails with its errors where it
    fails."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_jobs(script: Path, jobs: Any, folder: Path, *arguments: str, **environment: str) -> Any:
    """The last line that `script [arguments] JOBS.json` prints in `folder`, as JSON."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    printed = run_python(script, *arguments, folder / "jobs.json", cwd=folder, **environment)
    return json.loads(printed.splitlines()[-1])
