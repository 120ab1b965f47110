"""The runner of the distillation loss at sizes that take seconds: its ways agree, and a wrong one is not timed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from . import bench_distillation, rows, timing
from .bench_distillation import Case, Operands

SMALL = Case(37, 301, 16, 24, torch.float32)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Ceilings from little memory, one thread."""
    monkeypatch.setattr(timing, "GIB", 2**20)
    monkeypatch.setattr(timing.Timer, "matmul_rate", lambda timer: 0.5)
    monkeypatch.setattr(bench_distillation, "BLOCK", 10)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(tmp_path, cases=(SMALL,), *arguments):
    path = tmp_path / "distillation.csv"
    argv = ["--device", "cpu", "--runs", "2", "--no-compile", "--csv", str(path), *arguments]
    return bench_distillation.main(argv, cases), rows.read(path)


def test_figures(tmp_path):
    code, made = run(tmp_path, (SMALL, Case(20, 301, 16, 16)))
    assert code == 0
    installed = importlib.util.find_spec("liger_kernel") is not None
    ways = ["hywia", "eager", *(["liger chunked"] if installed else [])]
    assert [row["implementation"] for row in made] == ways * 2
    first = {row["implementation"]: row for row in made[: len(ways)]}
    assert first["hywia"]["case"] == "37x301 h 16/24 fp32"
    assert first["hywia"]["ratio_to_hywia"] == "1"
    assert float(first["eager"]["ratio_to_hywia"]) == pytest.approx(
        float(first["eager"]["ms"]) / float(first["hywia"]["ms"]), rel=1e-3
    )
    assert first["eager"]["gradient_bytes"] == str((37 + 301) * 16 * 4)
    for row in made:
        most = 1e-5 if row["dtype"] == "fp32" else 0.1
        assert max(float(row[name]) for name in ("loss_error", "hidden_error", "weight_error")) <= most
        assert (float(row["hidden_error"]) > 1e-4) == (row["dtype"] == "bf16")


def test_the_reference_is_autograd_s():
    given = Operands.random(SMALL, CPU)
    wide = Operands(
        *(x.detach().double() for x in (given.hidden, given.weight)),
        *(x.double() for x in (given.teacher_hidden, given.teacher_weight)),
    )
    wide.hidden.requires_grad_(), wide.weight.requires_grad_()
    log_p = (wide.teacher_hidden @ wide.teacher_weight.t()).log_softmax(1)
    log_q = (wide.hidden @ wide.weight.t()).log_softmax(1)
    want = wide.backward((log_p.exp() * (log_p - log_q)).sum() / 37)
    assert max(bench_distillation.errors(bench_distillation.reference(given), want)) < 1e-12
    assert float(want[0]) > 0.1


def test_a_wrong_gradient_is_not_timed(tmp_path, monkeypatch, capsys):
    original = bench_distillation.eager

    def wrong(given):
        loss, hidden, weight = original(given)
        return loss, hidden, weight * 1.01

    monkeypatch.setattr(bench_distillation, "eager", wrong)
    code, made = run(tmp_path, (SMALL,), "--only", "hywia", "eager")
    assert code == 1
    assert [row["implementation"] for row in made] == ["hywia"]
    assert "37x301 h 16/24 fp32, eager: WRONG" in capsys.readouterr().out


def test_a_case_by_name_with_other_tokens(tmp_path):
    code, made = run(tmp_path, (SMALL, Case(20, 65, 16, 16, torch.float32)), "--cases", "65", "--tokens", "9")
    assert (code, {row["case"] for row in made}) == (0, {"9x65 h 16 fp32"})
