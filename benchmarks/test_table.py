"""The rendered tables of small CSV files, word for word."""

from __future__ import annotations

import csv

import pytest
import torch

from . import (
    bench_cut,
    bench_distillation,
    bench_engine,
    bench_integrations,
    bench_large,
    bench_pruned,
    bench_recipe,
    bench_width,
    environment,
    harness,
    quality,
    rows,
    table,
)


def write(path, columns, lines):
    """Rows with the named values; the rest is empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows.ENVIRONMENT, *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return path


RUN = {"device": "GPU", "torch": "2.11", "triton": "3.6", "cuda": "13.0", "commit": "abc", "threads": 16}
OLD = {**RUN, "date": "2026-01-01T00:00Z", "command": "one", "copy_gb_s": 4000}
NEW = {**OLD, "date": "2026-01-02T00:00Z", "command": "two", "matmul_tflop_s": 700, "read_gb_s": 4100}


def figure(run, op, case, implementation, work_us, **more):
    return {**run, "op": op, "case": case, "implementation": implementation, "work_us": work_us, **more}


def test_ops(tmp_path, capsys):
    taylor, linear = "taylor_importance", "linear_importance"
    shares = {"tflop_s": 350, "share_of_matmul": 0.5, "baseline": "mm alone"}
    lines = [
        figure(OLD, taylor, "A", "eager", 90),
        figure(OLD, taylor, "A", "cuda", 30, gb_s=1000, share_of_copy=0.25),
        figure(OLD, taylor, "B", "eager", 60),
        figure(OLD, taylor, "B", "torch.compile", 12),
        figure(OLD, taylor, "B", "cuda", 20, gb_s=2000, share_of_copy=0.5),
        figure(OLD, taylor, "B", "triton", 24, gb_s=1800, share_of_copy=0.45),
        figure(NEW, taylor, "A", "eager", 80),
        figure(NEW, taylor, "A", "triton", 20, gb_s=3000, share_of_copy=0.75),
        figure(NEW, linear, "C", "mm alone", 80, share_of_baseline=1, **shares),
        figure(NEW, linear, "C", "triton", 100, share_of_baseline=0.8, **shares),
    ]
    path = write(tmp_path / "results.csv", harness.COLUMNS, lines)
    assert table.main(["--results", str(path), "--engine", str(tmp_path / "none.csv")]) == 0
    where = "GPU (torch 2.11, triton 3.6, CUDA 13.0)"
    new = f"{where}, 2026-01-02T00:00Z, abc, ceilings: copy 4000 GB/s, read 4100 GB/s, matmul 700 TFLOP/s"
    assert capsys.readouterr().out == (
        f"`taylor_importance`, {new}; {where}, 2026-01-01T00:00Z, abc, ceilings: copy 4000 GB/s.\n\n"
        "| case | by | µs | GB/s | of copy | × eager | × torch.compile |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| A | triton | 20.0 | 3000 | 75% | 4.00 |  |\n"
        "| B | cuda | 20.0 | 2000 | 50% | 3.00 | 0.60 |\n\n"
        f"`linear_importance`, {new}.\n\n"
        "| case | by | µs | TFLOP/s | of the product alone | of the matmul ceiling | × eager | × torch.compile |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| C | triton | 100.0 | 350 | 80% | 50% |  |  |\n"
    )


def test_engine(tmp_path, capsys):
    model = {**RUN, "shape": "7b", "layers": 32, "dtype": "bfloat16", "weights": "random", "length": 128}

    def row(date, flow, samples, seconds, ratio, peak, memory=""):
        sizes = {"peak_bytes": peak, "peak_over_weights": peak / 13.5e9, "memory": memory}
        times = {"seconds": seconds, "seconds_per_sample": seconds / samples, "ratio_to_plain": ratio}
        return {**model, "date": date, "flow": flow, "samples": samples, **times, **sizes}

    lines = [
        row("2026-01-02T00:00Z", "auto", 128, 1.6, 1.1, 54e9, "lean"),
        row("2026-01-02T00:00Z", "plain", 10, 0.12, 1, 27e9),
        row("2026-01-01T00:00Z", "plain", 10, 0.5, 1, 27e9),
    ]
    path = write(tmp_path / "engine.csv", bench_engine.COLUMNS, lines)
    assert table.main(["--results", str(tmp_path / "none.csv"), "--engine", str(path), "--device", "GPU"]) == 0
    assert capsys.readouterr().out == (
        "Scoring a whole model: 7b, 32 layers, bfloat16, random weights; GPU (torch 2.11, triton 3.6, CUDA 13.0), "
        "2026-01-02T00:00Z, abc.\n\n"
        "| flow | samples | s | ms a sample | × forward + backward | peak GB | × weights |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| plain | 10 × 128 | 0.120 | 12.00 | 1.00 | 27.0 | 2.00 |\n"
        "| auto (lean) | 128 × 128 | 1.600 | 12.50 | 1.10 | 54.0 | 4.00 |\n"
    )


def test_no_figures(tmp_path, capsys):
    assert table.main(["--results", str(tmp_path / "a.csv"), "--engine", str(tmp_path / "b.csv")]) == 1
    assert capsys.readouterr().out == "no figures\n"


PUBLISHED = {
    "results": harness,
    "engine": bench_engine,
    "integrations": bench_integrations,
    "speed": bench_pruned,
    "cut": bench_cut,
    "width": bench_width,
    "quality": quality,
    "distillation": bench_distillation,
    "recipe": bench_recipe,
    "large": bench_large,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_results_have_this_versions_columns(name):
    path = table.REPOSITORY / "benchmarks" / f"{name}.csv"
    columns = PUBLISHED[name].COLUMNS
    assert list(rows.read(path)[0]) == [*rows.ENVIRONMENT, *columns]
    assert not rows.ENVIRONMENT.keys() & columns.keys()
    read, written = rows.read_rows(path, columns), rows.read(path)
    for row, line in zip(read, written, strict=True):  # every field is of its column's type, and none is lost
        for name, value in row.values().items():
            text = "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
            assert text == line[name] or float(text) == float(line[name]), (name, line)


def test_a_row_of_other_columns_is_refused(tmp_path):
    appender = rows.Appender(tmp_path / "new.csv", {"seconds": float})
    run = environment.Environment.record(torch.device("cpu"), "module", ["--seed", "3"], 3)
    appender.append([rows.Row(run, {"seconds": 1 / 3})])
    with pytest.raises(ValueError, match="metres"):
        appender.append([rows.Row(run, {"metres": 1.0})])
    (row,) = rows.read_rows(tmp_path / "new.csv", {"seconds": float})
    assert row.environment == run
    assert (row.seconds, row.seed, row.command) == (0.33333, 3, "python -m module --seed 3")
    with pytest.raises(AttributeError, match="no column 'metres'"):
        _ = row.metres


def test_appending_to_other_columns_is_refused(tmp_path):
    (tmp_path / "old.csv").write_text("date,op\n1,2\n")
    with pytest.raises(SystemExit, match="has other columns than this version writes"):
        rows.Appender(tmp_path / "old.csv", harness.COLUMNS)
    assert (tmp_path / "old.csv").read_text() == "date,op\n1,2\n"
