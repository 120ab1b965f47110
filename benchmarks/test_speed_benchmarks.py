"""The benchmarks of widths, cuts and pruned models: what they derive from readings, and that they run."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch

import hywia_kernels as hk
from benchmarks import bench_cut, bench_pruned, bench_width, models
from benchmarks.environment import Environment
from benchmarks.rows import Row
from hywia_kernels.deploy import device_profiles
from hywia_kernels.deploy.cost import cost_of
from hywia_kernels.deploy.speed import Case


def made_up(times):
    """Rows of one form and count of tokens, with given µs by width."""
    ceilings = {"matmul_tflop_s": 1.0, "copy_gb_s": 1.0}
    environment = Environment("2026-01-01T00:00Z", "d", 1, "", "t", "", "", "", "", 0, "c", **ceilings)
    common = {"dtype": "float32", "tokens": 8, "hidden": 4}
    return [
        Row(environment, {**common, "form": form, "width": w, "us": us, "tflop_s": w / us})
        for form in ("up", "down")
        for w, us in times.items()
    ]


def test_alignment_is_read_off_the_line_between_multiples_of_256():
    times = {256 + a: (256 + a) / 10 for a in (0, *bench_width.ALIGNMENTS)}
    for a in (1, 2, 4):
        times[256 + a] *= 3
    times[256 + 8] *= 1.05
    times[256 + 16] *= 1.02
    costs = bench_width.alignment_costs(made_up(times), [256])
    assert costs[1] == pytest.approx(3)
    assert costs[8] == pytest.approx(1.05)
    assert bench_width.rule(costs) == 16
    assert bench_width.rule(costs, tolerance=0.01) == 32
    profile = bench_width.profile(made_up(times), [256])
    assert profile["align"] == 16
    assert profile["tflop_s"]["up"]["8"] == {"256": 10.0, "320": 10.0, "384": 10.0, "512": 10.0}


def test_a_sweep_becomes_a_target(tmp_path, capsys):
    csv_file, profile, figure = (tmp_path / name for name in ("w.csv", "p.json", "f.svg"))
    sweep = ["--device", "cpu", "--hidden", "32", "--tokens", "4", "--grid", "64", "256", "64", "--bases", "256"]
    assert bench_width.main([*sweep, "--runs", "2", "--csv", str(csv_file)]) == 0
    again = ["--tokens", "4", "--bases", "256", "--rows", str(csv_file)]
    assert bench_width.main([*again, "--profile", str(profile), "--figure", str(figure)]) == 0
    target = device_profiles.resolve(profile)
    assert target.measured
    assert target.align == json.loads(profile.read_text())["align"]
    assert sorted(target.tflop_s["down"][4]) == [64, 128, 192, 256, 320, 384, 512]
    assert len(re.findall(r'\bid="f[0-9a-f]+-line-\d"', figure.read_text())) == 2  # a curve a form
    assert f"rule: multiples of {target.align}" in capsys.readouterr().out


def test_widths_by_hand():
    dense = models.build("tiny", None, "float32", torch.device("cpu"))
    cut = bench_pruned.build("tiny", "1x80@1:2", None, "float32", torch.device("cpu"))
    assert [g.units for g in hk.groups(cut)] == [2, 176, 1, 80]
    case, step = Case("prefill", 1, 16), Case("decode", 2, 16)
    assert bench_pruned.ideal(case, cost_of(dense), cost_of(dense)) == 1.0
    assert bench_pruned.ideal(case, cost_of(dense), cost_of(cut)) == pytest.approx(
        cost_of(dense).prefill_flops(1, 16) / cost_of(cut).prefill_flops(1, 16)
    )
    assert bench_pruned.ideal(step, cost_of(dense), cost_of(cut)) > 1.05


def test_speed_rows(tmp_path):
    file = tmp_path / "s.csv"
    options = ["--device", "cpu", "--shape", "tiny", "--dtype", "float32", "--context", "8", "--runs", "2"]
    shapes = ["--models", "dense", "1x80", "--modes", "eager", "captured"]
    assert bench_pruned.main([*options, *shapes, "--csv", str(file)]) == 0
    with file.open() as handle:
        rows = list(csv.DictReader(handle))
    assert [r["model"] for r in rows] == ["dense"] * 8 + ["1x80"] * 8
    assert all(r["speedup"] == "1" for r in rows[:8])
    for base, row in zip(rows[:8], rows[8:], strict=True):
        assert float(row["speedup"]) == pytest.approx(float(base["ms"]) / float(row["ms"]), rel=1e-3)
        assert float(row["share"]) == pytest.approx(float(row["speedup"]) / float(row["ideal"]), rel=1e-3)


def test_cut_rows(tmp_path):
    file = tmp_path / "c.csv"
    options = ["--device", "cpu", "--shape", "tiny", "--dtype", "float32", "--ratios", "0.1", "--csv", str(file)]
    assert bench_cut.main(options) == 0
    with file.open() as handle:
        (row,) = csv.DictReader(handle)
    assert int(row["bytes_after"]) < int(row["bytes_before"])
    assert row["extra_bytes"] == ""  # only CUDA counts
