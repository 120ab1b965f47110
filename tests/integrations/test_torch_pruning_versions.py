"""The tests of torch_pruning with the oldest version that is supported, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OLDEST = "1.5.0"
FILES = ("test_torch_pruning", "test_torch_pruning_differences", "test_torch_pruning_scorers")
FOLDER = Path(os.environ.get("HYWIA_OLDEST_TORCH_PRUNING", ROOT / "build" / f"torch-pruning-{OLDEST}"))


@pytest.mark.slow
@pytest.mark.skipif(
    not (FOLDER / "torch_pruning").is_dir(),
    reason=f"torch-pruning {OLDEST} is not in {FOLDER}; `make setup` puts it there",
)
def test_the_oldest_supported_version():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER), str(ROOT)]), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / f"{n}.py") for n in FILES)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed, (\d+) xfailed", done.stdout)
    assert passed is not None, done.stdout[-400:]
    assert int(passed[1]) >= 60
    assert int(passed[2]) == 12  # the defects are as old as that
