"""The papers' table: its protocols, what it counts, what is published, and the command on tiny models."""

from __future__ import annotations

import json

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.deploy.cost import cost_of
from hywia_kernels.method import surgery
from tests.support.tiny import TINY, fresh
from tests.support.tokenizers import byte_tokenizer

from . import bench_pruned, costs, models, paper, published, tasks, texts
from .rows import read
from .settings import Setting


@pytest.fixture
def llama_7b():
    """Without memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**models.SHAPES["7b"]))


@pytest.mark.parametrize(("removed", "widths"), [(0.0, None), (0.2, "24x8256@4:30"), (0.5, "13x4403@3:31")])
def test_sizes_are_those_that_llm_pruners_paper_reports(llama_7b, removed, widths):
    """Its counter adds norms, softmax and rotary embedding."""
    told = next(r for r in published.read() if r.removed == removed and r.macs is not None)
    if widths:
        surgery.resize(llama_7b, bench_pruned.counts(llama_7b, widths))
    cost = cost_of(llama_7b)
    assert costs.macs(cost) == pytest.approx(told.macs, rel=1e-3)
    assert cost.parameters == pytest.approx(told.parameters, rel=2e-3)


def test_multiplications_are_those_of_a_plain_count():
    model = fresh(TINY[3])
    counted = 0
    handles = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):

            def hook(layer, arguments, output):
                nonlocal counted
                counted += arguments[0].numel() * layer.out_features

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(torch.zeros(1, 64, dtype=torch.int64))
    attention = 3 * 2 * 64 * 64 * 8 * 6  # layers, two products, pairs of positions, heads, their size
    assert costs.macs(cost_of(model)) == counted + attention


def test_protocols_follow_the_depth(llama_7b):
    assert paper.PROTOCOLS["papers20"].setting(llama_7b) == Setting(
        {"attention": 0.25, "mlp": 0.25}, layers=range(4, 30)
    )
    assert paper.PROTOCOLS["papers50"].setting(llama_7b).layers == range(3, 31)
    assert paper.PROTOCOLS["ratio50"].setting(llama_7b) == Setting(ratio=0.5)
    tiny = fresh(TINY[3])  # two KV groups, three layers: no quarter of heads can go, and no layer stays whole
    assert paper.PROTOCOLS["papers20"].setting(tiny) == Setting({"mlp": 0.25}, layers=range(0, 3))
    assert paper.PROTOCOLS["papers50"].setting(tiny).shares == {"attention": 0.6, "mlp": 0.6}


def test_published_rows_have_sources_and_means_of_their_tasks(tmp_path):
    rows = published.read()
    assert len(rows) > 60
    for row in rows:
        seven = [getattr(row, name) for name in tasks.NAMES]
        if seven[0] is not None:
            assert sum(seven) / 7 == pytest.approx(row.tasks_mean, abs=0.011), row
        assert row.block in (128, 2048)
        assert 0 <= row.removed <= 0.5
        assert (row.tasks_mean is None) == (row.tasks is None)
    assert {r.model for r in published.of_model("meta-llama/Llama-2-7b-hf", rows)} == {"llama-2-7b"}
    assert {r.model for r in published.of_model("smollm2", rows)} == {"llama-7b"}
    lines = published.FILE.read_text().splitlines()
    path = tmp_path / "published.csv"
    path.write_text("\n".join([lines[0], lines[1].replace(",figure", ",hearsay")]))
    with pytest.raises(ValueError, match="line 2: expected a source, and read_from out of"):
        published.read(path)


def test_perplexities_have_no_token_before_a_block():
    model, text = fresh(TINY[3]), "a fox and a dog sleep. " * 120
    got = texts.perplexities(model, texts.cut(byte_tokenizer(), text, texts.BLOCKS, most=3), batch=2)
    ids = torch.tensor(list(byte_tokenizer()(text)["input_ids"]))
    for block, count in ((128, 3), (2048, 1)):
        assert got[block] == pytest.approx(hk.perplexity(model, ids[: count * block].view(count, block)), rel=1e-5)


def test_blocks_of_all_lengths_read_as_many_tokens():
    text = "a fox and a dog sleep. " * 30
    got = texts.cut(byte_tokenizer(), text, (16, 64, 8, 512), most=9)
    assert {length: tuple(tokens.shape) for length, tokens in got.items()} == {
        16: (9, 16), 64: (2, 64), 8: (18, 8), 512: (1, 512),
    }  # fmt: skip
    assert torch.equal(got[16].flatten(), got[8].flatten())
    assert {length: len(tokens) for length, tokens in texts.cut(byte_tokenizer(), text, (64, 512)).items()} == {
        64: len(text) // 64, 512: 1,
    }  # fmt: skip


def test_long_blocks_go_through_the_model_fewer_at_a_time(monkeypatch):
    batches: dict[int, int] = {}
    monkeypatch.setattr(
        "hywia_kernels.perplexity", lambda model, tokens, *, batch: batches.setdefault(tokens.shape[1], batch)
    )
    cuts = {length: torch.zeros(8, length, dtype=torch.int64) for length in (128, 2048, 16384)}
    assert texts.perplexities(fresh(TINY[3]), cuts, batch=64) == batches == {128: 64, 2048: 4, 16384: 1}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "calib.txt").write_text("a quick brown fox jumps over the lazy dog, and then it sleeps. " * 60)
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"text {name} says that a cat sat on a mat, or did not. " * 50)
    row = {"context": "a cat", "choices": [" sat", " flew away"], "gold": 0}
    (tmp_path / "piqa.jsonl").write_text("\n".join(json.dumps(row) for _ in range(3)))
    return tmp_path


def command(folder, *more):
    options = ["--device", "cpu", "--csv", str(folder / "paper.csv"), "--seed", "0", "--align", "8"]
    return [*options, "--criteria", "recipe@4", "--context", "8", "--mode", "eager", "--runs", "2", *more]


def test_the_command_fills_a_row_for_every_model_and_recovery(folder, capsys):
    files = [str(folder / f"{name}.txt") for name in ("calib", "one", "two")]
    options = command(folder, "--calib", files[0], "--text", *files[1:], "--tasks", str(folder), "--harness", "own")
    options += ["--max-blocks", "2", "--questions", "2", "--recover", "none", "self", "--recover-tokens", "2048"]
    options += ["--protocols", "papers50", "ratio20"]
    dense, model = fresh(TINY[3]), fresh(TINY[3])
    session = paper.run(paper._arguments(options), model, byte_tokenizer(), options)
    assert session.finish() == 0
    rows = session.rows
    assert [(r.protocol, r.recovery) for r in rows[1:]] == [
        ("papers50", "none"), ("papers50", "self"), ("ratio20", "none"), ("ratio20", "self"),
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters(), strict=True))
    text = (folder / "one.txt").read_text()
    own = texts.perplexities(dense, texts.cut(byte_tokenizer(), text, texts.BLOCKS, 2), 64)
    assert (rows[0].text_128, rows[0].text_2048) == pytest.approx((own[128], own[2048]), rel=1e-5)
    assert [r.layers for r in rows] == ["", "0:3", "0:3", "all", "all"]
    for row in rows[1:]:
        assert None not in (row.second_text_128, row.second_text_2048, row.piqa, row.mean_se, row.prefill_ms)
        assert row.macs < rows[0].macs
        assert row.removed == pytest.approx(1 - row.parameters / rows[0].parameters)
    assert rows[2].divergence < rows[1].divergence
    assert rows[2].tokens_trained == 2048
    assert [r["harness"] for r in read(folder / "paper.csv")] == ["benchmarks.tasks"] * 5
    printed = capsys.readouterr().out
    assert "| recipe@4, papers50 | self |" in printed
    assert "| 20% | LLM-Pruner (second order), llama-7b | LoRA on Alpaca | 17.37 |  | 30.39 |  | 60.07 |" in printed


def test_random_weights_have_times_and_no_quality(folder, capsys):
    options = command(folder, "--random", "tiny", "--recover", "self", "--recover-tokens", "1024", "--tune", "scales")
    assert paper.main([*options, "--protocols", "ratio20", "--criteria", "recipe"]) == 0
    dense, cut = read(folder / "paper.csv")
    for row in (dense, cut):
        assert float(row["prefill_ms"]) > 0
        assert float(row["macs"]) > 0
        assert row["weights"] == "random"
        assert {row[n] for n in ("text", "text_128", "second_text_2048", "mean", "harness", "divergence")} == {""}
    assert float(cut["prune_seconds"]) > 0 < float(cut["recovery_seconds"])
    assert int(cut["tokens_trained"]) == 1024
    assert "no perplexity and no task" in capsys.readouterr().out


def test_a_harness_that_is_not_there_is_named(folder, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.lm_eval_tasks.available", lambda: False)
    for options, said in (
        (["--model", "smollm2"], "lm-eval needs the package lm_eval: pip install lm_eval"),
        (["--harness", "own"], "own needs --tasks DIR"),
        (["--harness", "own", "--tasks", str(folder), "--criteria", "wanda"], "expected criteria out of"),
    ):
        with pytest.raises(SystemExit):
            paper._arguments(options)
        assert said in capsys.readouterr().err
