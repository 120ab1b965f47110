"""The runner of recovery's parts at sizes that take seconds."""

from __future__ import annotations

import copy

import pytest
import torch

from . import bench_recovery, models, rows, timing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(timing, "GIB", 2**20)
    monkeypatch.setattr(timing.Timer, "matmul_rate", lambda timer: 0.5)


def test_rows_of_every_part(tmp_path):
    path = tmp_path / "recovery.csv"
    argv = ["--shape", "tiny", "--device", "cpu", "--runs", "2", "--length", "12", "--written", "3", "--samples", "2"]
    assert bench_recovery.main([*argv, "--tune", "full", "scales", "--csv", str(path)]) == 0
    made = rows.read(path)
    assert [(row["part"], row["way"], row["tune"], row["samples"]) for row in made] == [
        ("writer", "static", "", "3"),
        ("writer", "generate", "", "3"),
        ("step", "eager", "full", "2"),
        ("step", "eager", "scales", "2"),
    ]
    for row in made:
        assert float(row["tokens_per_second"]) == pytest.approx(
            int(row["samples"]) * 12 / float(row["ms"]) * 1e3, rel=1e-3
        )
        assert row["weights"] == "random"


def test_both_writers_write_the_same():
    model = models.build("tiny", None, "float32", CPU)
    starts = models.token_ids(model, 3, 2, CPU)
    static, generate = (call() for call in bench_recovery.writers(model, starts, 12).values())
    assert static.shape == (3, 12)
    assert torch.equal(static, generate)
    assert torch.equal(static[:, :2], starts)


def test_a_step_trains_a_copy():
    dense = models.build("tiny", None, "float32", CPU)
    cut = bench_recovery.cut_of(dense, 0.3)
    before = copy.deepcopy(cut.state_dict())
    removed = 1 - sum(p.numel() for p in cut.parameters()) / sum(p.numel() for p in dense.parameters())
    assert removed == pytest.approx(0.3, abs=0.02)
    with bench_recovery.step_of("eager", cut, dense, "full", 2, 12) as step:
        step()
    assert all(torch.equal(value, before[name]) for name, value in cut.state_dict().items())
