"""The benchmark of what `hywia prune` makes: its models, perplexities and widths are the command's own."""

from __future__ import annotations

import csv
import json

import pytest
import torch

import hywia_kernels as hk
from benchmarks import bench_smollm2, models
from benchmarks.rows import ENVIRONMENT
from hywia_kernels import cli


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny Llama with a tokenizer of words, as a user would have it, and a text."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(255)} | {"[UNK]": 255}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    models.build("tiny", None, "float32", torch.device("cpu")).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{(7 * i * i + 3 * i) % 251}" for i in range(3000)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


MORE = ["--calib", "text.txt", "--text", "text.txt", "--samples", "8", "--seq-len", "16", "--align", "8"]
MORE += ["--reconstruct-samples", "16", "--block", "32", "--max-blocks", "4"]


def test_what_is_measured_is_what_the_command_makes(tiny, capsys):
    options = ["--model", "model", "--ratios", "0.1", "0.2", "--context", "8", "--runs", "6", "--no-compile"]
    assert bench_smollm2.main([*options, "--csv", "s.csv", "--", *MORE]) == 0
    with open("s.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["phase"], r["model"]) for r in rows] == [
        (phase, name) for phase in ("prefill", "decode") for name in ("dense", "--ratio 0.1", "--ratio 0.2")
    ]
    assert [int(r["runs"]) for r in rows] == [2] * 3 + [6] * 3
    for row, ratio in ((rows[1], "0.1"), (rows[2], "0.2")):
        assert cli.main(["prune", "model", "-o", ratio, "--ratio", ratio, "--json", "r.json", *MORE]) == 0
        told = json.loads((tiny / "r.json").read_text())
        model, _ = hk.load(ratio)
        groups = {g.kind: g.units for g in hk.groups(model)}
        assert (int(row["kv_groups"]), int(row["channels"])) == (groups["attention"], groups["mlp"])
        assert int(row["parameters"]) == sum(p.numel() for p in model.parameters()) == told["after"]["parameters"]
        assert float(row["perplexity"]) == pytest.approx(told["after"]["perplexity"], rel=1e-4)
        assert float(rows[0]["perplexity"]) == pytest.approx(told["before"]["perplexity"], rel=1e-4)
        assert row["made_by"].startswith(f"hywia prune model --ratio {ratio} --calib text.txt")
        assert 0 < float(row["removed"]) < 1
        assert float(row["ideal"]) > 1
        assert float(row["share"]) == pytest.approx(float(row["speedup"]) / float(row["ideal"]), rel=1e-3)
    assert {float(r["speedup"]) for r in rows if r["model"] == "dense"} == {1.0}
    assert {r["torch"] for r in rows} == {torch.__version__}
    assert all(r["device"] and r["commit"] and r["transformers"] for r in rows)
    assert list(rows[0]) == [*ENVIRONMENT, *bench_smollm2.COLUMNS]


def test_speed_without_perplexity_is_refused(tiny):
    options = ["--model", "model", "--ratios", "0.1", "--context", "8", "--runs", "6", "--no-compile"]
    with pytest.raises(SystemExit, match="speed without perplexity"):
        bench_smollm2.main([*options, "--", *MORE[:-4], "--no-eval"])


def test_a_refused_request_ends_the_run(tiny, capsys):
    options = ["--model", "model", "--ratios", "0.999", "--context", "8", "--runs", "6", "--no-compile"]
    with pytest.raises(SystemExit) as ended:
        bench_smollm2.main([*options, "--", *MORE])
    assert ended.value.code == 2
    assert "ratio: 0.999" in capsys.readouterr().err


class Clocked:
    """Models that take as many ticks as they say, on a machine that slows down twofold in between."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def model(self, name, ticks):
        def run():
            self.calls.append(name)
            self.now += ticks * (1 + len(self.calls) // 20)

        work = bench_smollm2.Cost((), 1, 1, (1,), (1,), 4, 10, 10, 10)
        return bench_smollm2.Made(name, "", 1.0, (1, 1), work, {"prefill": run, "decode": run})


def test_a_speedup_is_of_times_taken_together():
    clocked = Clocked()
    made = [clocked.model("dense", 3.0), clocked.model("half", 2.0)]
    times = bench_smollm2.in_turns(made, 12, lambda: clocked.now)
    assert [len(seconds) for seconds in times["decode"]] == [12, 12]
    assert [len(seconds) for seconds in times["prefill"]] == [4, 4]
    turns = clocked.calls[8:]  # after the warm-up
    assert turns[:8] == ["dense", "half", "dense", "half", "half", "dense", "dense", "half"]
    rows = bench_smollm2.figures(made, times, 8)
    assert max(times["decode"][0]) >= 2 * min(times["decode"][0])
    assert [r["speedup"] for r in rows if r["model"] == "half"] == pytest.approx([1.5, 1.5])
