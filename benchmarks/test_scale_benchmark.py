"""The runner of streamed scoring end to end on a tiny shape; its figures' arithmetic, not their speed."""

from __future__ import annotations

import pytest

from . import bench_scale, models, rows


def test_every_place_gets_a_row(tmp_path, capsys):
    path = tmp_path / "scale.csv"
    command = ["--device", "cpu", "--shape", "tiny", "--layers", "3", "--samples", "9", "--length", "8", "--runs", "2"]
    places = ["--places", "device", "host", "files", "--folder", str(tmp_path / "model"), "--compare"]
    assert bench_scale.main([*command, *places, "--csv", str(path)]) == 0
    read = rows.read(path)
    assert [(row["flow"], row["place"]) for row in read] == [
        ("streamed", "device"),
        ("lean", "device"),
        ("streamed", "host"),
        ("streamed", "files"),
    ]
    layer = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 176 + 2 * 64)  # bytes: q and o, k and v, the MLP, two norms
    assert [int(row["bytes_moved"]) for row in read] == [0, 0, 6 * layer, 6 * layer]
    assert [row["runs"] for row in read] == ["8", "1", "8", "8"]
    assert all(float(row["seconds"]) > 0 and row["ranks"] == "1" for row in read)
    assert capsys.readouterr().out.count(" x 3 layers, ") == 4


def test_a_failed_gate_ends_the_run(monkeypatch, capsys):
    monkeypatch.setattr(bench_scale, "agree", lambda *_: 0.5)
    assert bench_scale.main(["--device", "cpu", "--shape", "tiny", "--samples", "2", "--length", "8"]) == 1
    assert "gate: expected at most 1e-06" in capsys.readouterr().out


def test_files_need_a_folder():
    with pytest.raises(SystemExit):
        bench_scale.main(["--device", "cpu", "--places", "files"])


def test_shapes_are_the_models():
    """70B as its config says: 855,654,400 parameters of a layer."""
    shape = models.SHAPES["70b"]
    size, kv = shape["hidden_size"], shape["num_key_value_heads"] * 128
    layer = 2 * size * size + 2 * size * kv + 3 * size * shape["intermediate_size"] + 2 * size
    assert layer == 855_654_400
