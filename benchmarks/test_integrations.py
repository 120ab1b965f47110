"""The runner end to end on a tiny model; its figures' arithmetic, not their speed."""

from __future__ import annotations

import json

import pytest
import torch

from . import bench_integrations, models, rows, timing


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(timing, "GIB", 2**20)
    monkeypatch.setattr(timing.Timer, "matmul_rate", lambda timer: 0.5)
    # Torch-Pruning's graph of the tiny shape's own heads does not end.
    tiny = models.SHAPES["tiny"] | {"num_attention_heads": 8, "num_key_value_heads": 8}
    monkeypatch.setitem(models.SHAPES, "tiny", tiny)
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_pruning_side_by_side(tmp_path):
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    table, record = tmp_path / "integrations.csv", tmp_path / "integrations.json"
    arguments = [
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--samples",
        "2",
        "--length",
        "8",
        "--runs",
        "2",
        "--limit",
        "0.1",
    ]
    more = ["--only", "torch_pruning", "--csv", str(table), "--json", str(record)]
    assert bench_integrations.main([*arguments, *more]) == 0
    by_side = {(row["criterion"], row["side"]): row for row in rows.read(table)}
    assert len(by_side) == 8
    for criterion in ("MagnitudeImportance", "TaylorImportance"):
        ours, theirs = by_side[criterion, "ours"], by_side[criterion, "theirs"]
        assert float(ours["error"]) < 1e-6
        assert float(ours["kept"]) == 1.0
        assert float(ours["times_faster"]) == pytest.approx(float(theirs["seconds"]) / float(ours["seconds"]), rel=1e-3)
    assert by_side["HessianImportance", "ours"]["error"] == ""  # upstream keeps the last sample only
    assert json.loads(record.read_text())["failures"] == []


def test_a_tool_that_is_missing_is_a_failure(monkeypatch, capsys):
    monkeypatch.setitem(bench_integrations.CONTRACTS, "llm_pruner", lambda *_: (_ for _ in ()).throw(ImportError("no")))
    assert bench_integrations.main(["--device", "cpu", "--shape", "tiny", "--only", "llm_pruner"]) == 1
    assert "llm_pruner: ImportError: no" in capsys.readouterr().out


def test_agreement_counts_the_better_half():
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    error, kept = bench_integrations.agreement([a], [b])
    assert error == 0.25
    assert kept == 0.5
