"""The benchmark of large models end to end at sizes that take seconds; its figures' arithmetic, not their speed."""

from __future__ import annotations

import importlib.util
import json
import time

import pytest
import torch
import transformers

import hywia_kernels as hk
from hywia_kernels.checkpoint.stored_model import open_stored

from . import bench_large, checkpoints, memory, rows

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--shape", "tiny", "--seed", "3", "--length", "12"]
needs_scale = pytest.mark.skipif(
    importlib.util.find_spec("hywia_kernels.scale") is None, reason="the streamed scoring is not there"
)


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


@needs_scale
def test_stream(tmp_path):
    argv = ["stream", *TINY, "--samples", "5", "--folder", str(tmp_path), "--csv", str(tmp_path / "scale.csv")]
    assert bench_large.main(argv) == 0
    by_place = {row["place"]: row for row in rows.read(tmp_path / "scale.csv")}
    assert list(by_place) == ["host", "files"]
    assert len({row["units"] for row in by_place.values()}) == 1
    for row in by_place.values():
        assert float(row["samples_s"]) == pytest.approx(5 / float(row["seconds"]), rel=1e-3)
        assert float(row["ratio"]) == pytest.approx(float(row["seconds"]) / float(row["limit_seconds"]), rel=1e-3)
        assert row["limit"] in ("compute", "transfer")


@needs_scale
def test_ranks(tmp_path):
    argv = ["ranks", *TINY, "--ranks", "1", "2", "--samples", "6", "--folder", str(tmp_path)]
    assert bench_large.main([*argv, "--csv", str(tmp_path / "scale.csv")]) == 0
    by_kind = {(row["scaling"], row["ranks"]): row for row in rows.read(tmp_path / "scale.csv")}
    assert list(by_kind) == [("strong", "1"), ("strong", "2"), ("weak", "1"), ("weak", "2")]
    assert by_kind["strong", "1"]["units"] == by_kind["strong", "2"]["units"]
    assert [by_kind[kind]["samples"] for kind in by_kind] == ["6", "6", "6", "12"]
    one, two = by_kind["strong", "1"], by_kind["strong", "2"]
    assert float(two["limit_seconds"]) == pytest.approx(float(one["seconds"]) / 2, rel=1e-3)
