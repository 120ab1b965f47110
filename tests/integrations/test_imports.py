"""Neither tool is imported before it is asked for, and without it an integration says what to get."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str, *path: str) -> str:
    """Standard output of a fresh interpreter."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BLOCKED = """
import sys
for name in {names}: sys.modules[name] = None
try:
    import hywia_kernels.integrations.{module}
except ImportError as error:
    print(error)
"""


def test_importing_the_package_imports_no_tool():
    code = "import sys, hywia_kernels as hk; hk.Scorer; print({'torch_pruning', 'LLMPruner'} & set(sys.modules))"
    assert run(code) == "set()"


def test_without_torch_pruning():
    said = run(BLOCKED.format(names=["torch_pruning"], module="torch_pruning"))
    assert "needs Torch-Pruning" in said
    assert said.endswith("pip install 'torch-pruning>=1.5'")


def test_without_llm_pruner():
    said = run(BLOCKED.format(names=["LLMPruner"], module="llm_pruner"))
    assert "git clone https://github.com/horseee/LLM-Pruner and add the folder to PYTHONPATH" in said


@pytest.mark.parametrize("missing", ["sentencepiece"])
def test_llm_pruner_without_what_it_needs_itself(tmp_path, missing):
    package = tmp_path / "LLMPruner"
    package.mkdir()
    (package / "__init__.py").write_text(f"import {missing}\n")
    said = run(BLOCKED.format(names=[missing], module="llm_pruner"), str(tmp_path))
    assert said.startswith("LLM-Pruner was found, but it needs a package that was not:")
    assert missing in said
