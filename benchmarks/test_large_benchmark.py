"""The benchmark of large models end to end at sizes that take seconds; its figures' arithmetic, not their speed."""

from __future__ import annotations

import json
import time

import pytest
import torch
import transformers

import hywia_kernels as hk
from hywia_kernels.checkpoint.stored_model import open_stored

from . import bench_large, checkpoints, memory, models, rows

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--shape", "tiny", "--seed", "3", "--length", "12"]


@pytest.fixture(autouse=True)
def no_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def test_a_written_checkpoint_loads(tmp_path):
    checkpoints.write(tmp_path / "model", "tiny", 1, "bfloat16", CPU, shard=60_000)
    model, _ = hk.load(tmp_path / "model")
    assert (model.dtype, len(model.model.layers), model.lm_head.weight.shape) == (torch.bfloat16, 1, (256, 64))
    assert 0.01 < float(model.model.layers[0].mlp.up_proj.weight.detach().float().std()) < 0.03
    assert len(checkpoints.weight_files(tmp_path / "model")) > 1
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert checkpoints.read(tmp_path / "model") > held


def test_a_plan_by_chance_is_for_the_files(tmp_path):
    checkpoints.write(tmp_path / "model", "tiny", None, "float32", CPU)
    plan = bench_large.plan_of(open_stored(tmp_path / "model"), 0.5)
    assert 0.4 < plan.ratio < 0.6
    model, _ = hk.load(tmp_path / "model")
    hk.prune(model, plan)
    assert sum(p.numel() for p in model.parameters()) == plan.parameters_after


def test_files(tmp_path, capsys):
    argv = ["files", *TINY, "--samples", "6", "--folder", str(tmp_path), "--csv", str(tmp_path / "scale.csv")]
    assert bench_large.main([*argv, "--json", str(tmp_path / "scale.json")]) == 0
    copied, cut, refit = rows.read(tmp_path / "scale.csv")
    assert [row["work"] for row in (copied, cut, refit)] == ["copy", "cut", "refit"]
    assert (copied["ratio"], copied["limit"], cut["samples"]) == ("", "", "")
    for row in (cut, refit):
        assert float(row["limit_seconds"]) == float(copied["seconds"])
        assert float(row["ratio"]) == pytest.approx(float(row["seconds"]) / float(copied["seconds"]), rel=1e-3)
        assert (row["shape"], row["layers"], row["dtype"], row["limit"]) == ("tiny", "2", "float32", "copy")
        assert int(row["weight_bytes"]) > 400_000
    assert (refit["samples"], refit["length"]) == ("6", "12")
    assert json.loads((tmp_path / "scale.json").read_text())["failures"] == []
    assert "of copy's" in capsys.readouterr().out
    assert sorted(f.name for f in tmp_path.iterdir()) == ["scale.csv", "scale.json"]


def test_the_peak_of_a_process_is_seen_by_another():
    with memory.HostPeak() as peak:
        held = torch.ones(1 << 23, dtype=torch.int64)
        time.sleep(0.5)
        assert int(held.sum()) == 1 << 23
    assert 0.9 * (1 << 26) < peak.bytes < 2 * (1 << 26)


def test_stream(tmp_path):
    argv = ["stream", *TINY, "--layers", "3", "--samples", "9", "--folder", str(tmp_path)]
    argv += ["--places", "device", "host", "files", "--compare", "--csv", str(tmp_path / "scale.csv")]
    assert bench_large.main(argv) == 0
    read = rows.read(tmp_path / "scale.csv")
    assert [(row["work"], row["place"]) for row in read] == [
        ("lean", "device"),
        ("score", "device"),
        ("score", "host"),
        ("score", "files"),
    ]
    lean, resident, host, files = read
    assert len({row["units"] for row in (resident, host)}) == 1
    assert [row["runs"] for row in read] == ["1", "8", "8", "8"]
    for row in (resident, host, files):
        assert float(row["samples_s"]) == pytest.approx(9 / float(row["seconds"]), rel=1e-3)
        assert float(row["ratio"]) == pytest.approx(float(row["seconds"]) / float(row["limit_seconds"]), rel=1e-3)
    assert (resident["limit"], float(resident["limit_seconds"])) == ("lean", float(lean["seconds"]))
    assert host["limit"] in ("compute", "transfer")
    layer = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 176 + 2 * 64)  # bytes: q and o, k and v, the MLP, two norms
    assert [row["bytes_moved"] for row in read] == ["", "0", str(6 * layer), str(6 * layer)]
    assert {row["orders"] for row in read} == {"second"}


def test_ranks(tmp_path):
    argv = ["ranks", *TINY, "--ranks", "1", "2", "--samples", "6", "--folder", str(tmp_path), "--places", "host"]
    argv += ["--orders", "first", "second", "mixed", "--csv", str(tmp_path / "scale.csv")]
    assert bench_large.main(argv) == 0
    by_kind = {(row["scaling"], row["ranks"]): row for row in rows.read(tmp_path / "scale.csv")}
    assert list(by_kind) == [("strong", "1"), ("strong", "2"), ("weak", "1"), ("weak", "2")]
    assert by_kind["strong", "1"]["units"] == by_kind["strong", "2"]["units"]
    assert [by_kind[kind]["samples"] for kind in by_kind] == ["6", "6", "6", "12"]
    one, two = by_kind["strong", "1"], by_kind["strong", "2"]
    assert float(two["limit_seconds"]) == pytest.approx(float(one["seconds"]) / 2, rel=1e-3)
    # Of two processes each gets half of the tokens' shared operands, and a quarter of the others'.
    shared, own = 4 * 64, 64 + 2 * 32 + 64 + 3 * 176
    assert [int(one["bytes_exchanged"]), int(two["bytes_exchanged"])] == [
        0,
        2 * 2 * (6 * 12 // 2) * 4 * (shared + own // 2),
    ]


def test_a_failed_gate_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_large.streamed, "distance", lambda *_: 0.5)
    assert bench_large.main(["stream", *TINY, "--places", "host", "--folder", str(tmp_path)]) == 1
    assert "gate: expected at most 1e-06 from calibrate's sums, got 5.0e-01" in capsys.readouterr().out


def test_shapes_are_the_models():
    """70B as its config says: 855,654,400 parameters of a layer."""
    shape = models.SHAPES["70b"]
    size, kv = shape["hidden_size"], shape["num_key_value_heads"] * 128
    layer = 2 * size * size + 2 * size * kv + 3 * size * shape["intermediate_size"] + 2 * size
    assert layer == 855_654_400
