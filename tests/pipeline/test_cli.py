"""The command line: exit codes, messages, and nothing written where it fails."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.cli import main
from hywia_kernels.settings import RIDGE
from tests.support.tiny import Tiny

TEXT = "the quick brown fox jumps over the lazy dog. " * 30


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    """A working directory with a model and calibration text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "tiny.txt").write_text("abc")
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


SMALL = ["--samples", "3", "--seq-len", "16", "--align", "4", "--block", "32", "--max-blocks", "3"]
CALIB = ["--calib", "text.txt"]


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_prune_end_to_end(here, capsys):
    code = main(
        ["prune", "model", "-o", "out", "--ratio", "0.2", *CALIB, *SMALL, "--text", "text.txt", "--json", "r.json"]
        + ["--prompt", "the quick"]
    )
    assert code == 0
    report = json.loads((here / "r.json").read_text())
    assert sorted(report) == ["after", "before", "output", "plan", "recipe"]
    for side in ("before", "after"):
        assert {"perplexity", "parameters", "bytes", "tokens_per_second"} <= set(report[side])
    model, _ = hk.load("out")
    assert report["after"]["parameters"] == sum(p.numel() for p in model.parameters())
    removed = 1 - report["after"]["parameters"] / report["before"]["parameters"]
    assert removed == pytest.approx(report["plan"]["removed_ratio"], abs=1e-12)
    assert abs(removed - 0.2) < 0.03
    assert report["after"]["bytes"] == (here / "out" / "model.safetensors").stat().st_size
    printed = capsys.readouterr().out
    assert f"{report['after']['parameters']:,}" in printed
    assert "before continues:" in printed
    record = json.loads((here / "out" / "hywia.json").read_text())
    assert record["arguments"]["ratio"] == 0.2
    assert record["plan"]["scores"]["statistics"]["calibration_sha256"]
    assert record["plan"]["scores"]["statistics"]["seed"] == 0


def test_pruning_is_reproducible(here):
    for out in ("one", "two"):
        assert main(["prune", "model", "-o", out, "--ratio", "0.2", *CALIB, *SMALL, "--no-eval"]) == 0
    assert (here / "one" / "model.safetensors").read_bytes() == (here / "two" / "model.safetensors").read_bytes()


def test_default_calibration_needs_no_data(here):
    assert main(["prune", "model", "-o", "out", "--ratio", "0.15", *SMALL, "--no-eval"]) == 0
    record = json.loads((here / "out" / "hywia.json").read_text())
    assert record["plan"]["scores"]["statistics"]["calib"] == "written by the model"


@pytest.mark.parametrize(
    ("how", "engine", "memory"),
    [([], "fused", "fast"), (["--memory", "lean"], "fused", "lean"), (["--engine", "autograd"], "autograd", "fast")],
)
def test_engine_and_memory_are_chosen_and_recorded(here, how, engine, memory):
    assert (
        main(["score", "model", "-o", "s", *CALIB, "--samples", "3", "--seq-len", "16", *how, "--json", "s.json"]) == 0
    )
    record = json.loads((here / "s.json").read_text())["scores"]["statistics"]
    assert (record["engine"], record["memory"]) == (engine, memory)


def test_scores_are_reused_at_another_ratio_and_fusion(here):
    assert main(["score", "model", "-o", "scores", *CALIB, "--samples", "3", "--seq-len", "16"]) == 0
    cut = ["--scores", "scores", "--align", "4", "--no-eval"]
    assert main(["prune", "model", "-o", "a", "--ratio", "0.2", *cut]) == 0
    assert main(["prune", "model", "-o", "b", "--ratio", "0.3", *cut, "--fusion", "fine", "--order", "first"]) == 0
    direct = ["--ratio", "0.3", *CALIB, *SMALL, "--no-eval", "--fusion", "fine", "--order", "first"]
    assert main(["prune", "model", "-o", "c", *direct]) == 0
    assert (here / "b" / "model.safetensors").read_bytes() == (here / "c" / "model.safetensors").read_bytes()
    assert hk.load("a")[0].config.intermediate_size > hk.load("b")[0].config.intermediate_size


def test_scores_of_another_model_are_refused(here, capsys):
    assert main(["score", "model", "-o", "scores", "--criterion", "magnitude"]) == 0
    model, tokenizer = hk.load("model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.01)
    hk.save(model, tokenizer, "tuned")
    before = listing(here)
    assert main(["prune", "tuned", "-o", "out", "--ratio", "0.2", "--scores", "scores", "--no-eval"]) == 1
    assert "scores: made for another model" in capsys.readouterr().err
    assert listing(here) == before


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_other_criteria(here, criterion):
    assert main(["prune", "model", "-o", "out", "--ratio", "0.2", "--criterion", criterion, *SMALL, "--no-eval"]) == 0
    assert json.loads((here / "out" / "hywia.json").read_text())["plan"]["scores"]["criterion"] == criterion


def test_papers_protocol_writes_an_adaptive_directory_that_eval_takes(here):
    how = ["--group-ratio", "0.5", "--layers", "1:3", "--units", "mlp", "--layout", "uniform", "--no-refit"]
    assert main(["prune", "model", "-o", "out", *how, *CALIB, *SMALL, "--text", "text.txt", "--json", "p.json"]) == 0
    assert main(["eval", "out", "--text", "text.txt", "--block", "32", "--max-blocks", "3", "--json", "e.json"]) == 0
    pruned, evaluated = json.loads((here / "p.json").read_text()), json.loads((here / "e.json").read_text())
    assert pruned["plan"]["layout"] == "adaptive"
    assert pruned["plan"]["widths"]["mlp"] == [56, 28, 28]
    assert sorted(evaluated) == ["bytes", "parameters", "perplexity", "text", "tokens_per_second"]
    assert evaluated["perplexity"] == pytest.approx(pruned["after"]["perplexity"], rel=1e-6)
    assert evaluated["parameters"] == pruned["after"]["parameters"]


PRUNE = ["prune", "model", "-o", "out"]
BAD = [
    (["prune", "model", "-o", "out", "--ratio", "0"], 2, "ratio: expected a number between 0 and 1"),
    (["prune", "model", "-o", "out", "--ratio", "1.5"], 2, "ratio: expected a number between 0 and 1"),
    (["prune", "model", "-o", "out", "--ratio", "nan"], 2, "ratio: expected a number between 0 and 1"),
    ([*PRUNE, "--ratio", "0.97", *CALIB, *SMALL], 2, "ratio: 0.97 cannot be reached"),
    ([*PRUNE], 2, "exactly one of ratio and group_ratio"),
    ([*PRUNE, "--ratio", "0.2", "--layers", "1:2"], 2, "layers: goes with group_ratio"),
    ([*PRUNE, "--ratio", "0.2", "--layers", "x"], 2, "expected FIRST:END"),
    ([*PRUNE, "--group-ratio", "0.5", "--layers", "1:9", *CALIB, *SMALL], 2, "layers: expected FIRST:END with"),
    ([*PRUNE, "--ratio", "0.2", "--units", "norms"], 2, "units: expected some of mlp, attention"),
    ([*PRUNE, "--ratio", "0.2", "--align", "0"], 2, "align: expected at least 1"),
    (["prune", "nowhere/at/all", "-o", "out", "--ratio", "0.2"], 1, "no such directory: nowhere/at/all"),
    ([*PRUNE, "--ratio", "0.2", "--criterion", "wanda"], 2, "invalid choice: 'wanda'"),
    ([*PRUNE, "--ratio", "0.2", "--fusion", "sum"], 2, "invalid choice: 'sum'"),
    ([*PRUNE, "--ratio", "0.2", "--order", "third"], 2, "invalid choice: 'third'"),
    ([*PRUNE, "--ratio", "0.2", "--backend", "tpu"], 2, "invalid choice: 'tpu'"),
    ([*PRUNE, "--ratio", "0.2", "--memory", "huge"], 2, "invalid choice: 'huge'"),
    (
        [*PRUNE, "--ratio", "0.2", "--memory", "layerwise", "--engine", "autograd"],
        2,
        "memory: expected auto, fast or lean",
    ),
    ([*PRUNE, "--ratio", "0.2", "--criterion", "random", "--memory", "lean"], 2, "memory: goes with --criterion hywia"),
    ([*PRUNE, "--ratio", "0.2", "--dtype", "int4"], 2, "invalid choice: 'int4'"),
    ([*PRUNE, "--ratio", "0.2", "--device", "abacus"], 2, "device: expected auto, cpu, cuda or cuda:N"),
    ([*PRUNE, "--ratio", "0.2", "--calib", "no.txt"], 1, "calib: no such file: no.txt"),
    ([*PRUNE, "--ratio", "0.2", "--calib", "empty.txt"], 1, "calib: empty.txt is empty"),
    ([*PRUNE, "--ratio", "0.2", "--calib", "tiny.txt", *SMALL], 1, "shorter than one sample of 16 tokens"),
    ([*PRUNE, "--ratio", "0.2", "--samples", "0"], 2, "samples: expected at least 1"),
    ([*PRUNE, "--ratio", "0.2", "--seq-len", "1"], 2, "seq_len: expected at least 2"),
    ([*PRUNE, "--ratio", "0.2", "--criterion", "random", "--fusion", "fine"], 2, "fusion: goes with --criterion hywia"),
    ([*PRUNE, "--ratio", "0.2", "--scores", "nope"], 1, "nope is not a directory written by 'hywia score'"),
    ([*PRUNE, "--ratio", "0.2", "--scores", "s", "--seed", "1"], 2, "seed: does not go with --scores"),
    ([*PRUNE, "--ratio", "0.2", "--text", "no.txt"], 1, "text: cannot read no.txt"),
    ([*PRUNE, "--ratio", "0.2", "--json", "no/dir/r.json"], 2, "json: no such directory"),
    (["prune", "model", "-o", "model", "--ratio", "0.2"], 2, "model exists; choose another directory"),
    (["prune", "model", "-o", "text.txt/out", "--ratio", "0.2"], 1, "output: cannot write in"),
    (["prune", "text.txt", "-o", "out", "--ratio", "0.2"], 1, "got the file text.txt"),
    (["score", "model", "-o", "model"], 2, "model exists; choose another directory"),
    (["eval", "model", "--text", "tiny.txt"], 1, "text: expected at least one block of 128 tokens, got 3"),
    (["eval", "model", "--block", "1"], 2, "block: expected a block of at least 2"),
    (["frobnicate"], 2, "invalid choice: 'frobnicate'"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_bad_input(here, capsys, arguments, code, message):
    before = listing(here)
    try:
        got = main(arguments)
    except SystemExit as stop:  # argparse's own refusals
        got = stop.code
    assert got == code
    assert message in capsys.readouterr().err
    assert listing(here) == before


def test_backend_that_is_off_is_refused_by_name(here, capsys):
    off = [b for b in hk.ops.availability() if not b.on]
    if not off:
        pytest.skip("every backend is on here")
    before = listing(here)
    assert main([*PRUNE, "--ratio", "0.2", "--backend", off[0].name]) == 2
    error = capsys.readouterr().err
    assert f"'{off[0].name}' is off on this machine" in error
    assert off[0].reason in error
    assert listing(here) == before


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_weights_are_named(here, capsys, poison):
    model, tokenizer = hk.load("model")
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0, 0] = poison
    model.save_pretrained("bad")
    tokenizer.save_pretrained("bad")
    before = listing(here)
    assert main(["prune", "bad", "-o", "out", "--ratio", "0.2", *CALIB, *SMALL]) == 1
    assert "model.layers.2.self_attn.v_proj.weight: expected finite weights" in capsys.readouterr().err
    assert listing(here) == before


def test_tokenizer_of_another_model(here, capsys):
    """A model whose vocabulary is smaller than its tokenizer's."""
    model = Tiny("small", heads=6, kv_heads=3, tied=True).build()
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.resize_token_embeddings(100)
    model.save_pretrained("small")
    hk.load("model")[1].save_pretrained("small")
    assert main(["prune", "small", "-o", "out", "--ratio", "0.2", *CALIB, *SMALL, "--no-eval"]) == 1
    assert "vocabulary [0, 100)" in capsys.readouterr().err
    assert not (here / "out").exists()


def test_pickled_model_is_never_loaded(here, capsys):
    (here / "model" / "model.safetensors").unlink()
    torch.save({}, here / "model" / "pytorch_model.bin")
    assert main([*PRUNE, "--ratio", "0.2"]) == 1
    assert "never loaded" in capsys.readouterr().err


def test_info_lists_every_backend_and_why_it_is_off(here, capsys):
    assert main(["info", "--json", "info.json"]) == 0
    found = json.loads((here / "info.json").read_text())
    assert list(found["backends"]) == ["reference", "native", "triton", "cuda"]
    assert found["backends"]["reference"]["on"] is True
    printed = capsys.readouterr().out
    for name, state in found["backends"].items():
        assert name in printed
        assert state["on"] or (state["reason"] and state["reason"] in printed)


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "hywia_kernels.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("score", "prune", "eval", "info"):
        assert command in done.stdout


def test_lines_not_bars_where_there_is_no_terminal(here):
    done = subprocess.run(
        [sys.executable, "-m", "hywia_kernels.cli", *PRUNE, "--ratio", "0.2", *CALIB, *SMALL, "--no-eval"],
        capture_output=True,
        text=True,
        cwd=here,
    )
    assert done.returncode == 0, done.stderr
    assert "scoring: done in" in done.stderr
    assert "\r" not in done.stderr
    assert "%|" not in done.stderr


def record_of(folder):
    record = json.loads((folder / "hywia.json").read_text())
    return record["plan"] | {"keep": record["kept_units"]}


def test_the_default_recipe_refits_and_says_so(here, capsys):
    cut = ["prune", "model", "--group-ratio", "mlp=0.5,attention=0.34", "--layers", "1:3", *CALIB, *SMALL, "--no-eval"]
    assert main([*cut, "-o", "recipe"]) == 0
    assert "reconstructed 4 matrices on " in capsys.readouterr().out
    assert main([*cut, "-o", "plain", "--no-refit"]) == 0
    assert "reconstructed" not in capsys.readouterr().out
    recipe, plain = record_of(here / "recipe"), record_of(here / "plain")
    assert (recipe["layout"], plain["layout"]) == ("adaptive", "adaptive")  # layer 0 is whole in both
    assert recipe["parameters_after"] == plain["parameters_after"]
    assert plain["widths"]["attention"] == recipe["widths"]["attention"] == [3, 2, 2]
    assert sum(recipe["widths"]["mlp"]) == 112
    assert recipe["refit"]["ridge"] == RIDGE
    assert recipe["refit"]["samples"] == len(TEXT) // 16, "a text with fewer samples than the refit takes gives all"
    assert all(after < before for before, after in recipe["refit"]["relative_error"].values())
    assert "refit" not in plain
    assert recipe["scores"]["heads"] == "leftover"
    assert "heads" not in plain["scores"], "no reconstruction follows that could make up for a head"


def test_stored_scores_give_what_scoring_anew_gives(here):
    """The text is kept with the scores, so heads are ranked and weights reconstructed on the same samples."""
    text = [*CALIB, "--samples", "3", "--seq-len", "16"]
    assert main(["score", "model", "-o", "scores", *text]) == 0
    cut = ["prune", "model", "--group-ratio", "mlp=0.5,attention=0.34", "--align", "4", "--no-eval"]
    assert main([*cut, "-o", "anew", *text]) == 0
    assert main([*cut, "-o", "stored", "--scores", "scores"]) == 0
    anew, stored = (json.loads((here / d / "hywia.json").read_text()) for d in ("anew", "stored"))
    assert stored["recipe"] == anew["recipe"]
    assert stored["kept_units"] == anew["kept_units"]
    assert stored["plan"]["refit"]["samples"] == len(TEXT) // 16
    weights = [(here / d / "model.safetensors").read_bytes() for d in ("anew", "stored")]
    assert weights[0] == weights[1]


def test_stored_scores_without_text_are_refused_only_where_text_is_needed(here, capsys):
    model, _ = hk.load("model")
    batches = torch.randint(0, 250, (3, 16), generator=torch.Generator().manual_seed(0))
    statistics = hk.calibrate(model, batches)
    hk.save_scores("scores", hk.fuse(statistics), statistics)
    cut = ["prune", "model", "--scores", "scores", "--ratio", "0.2", "--align", "4", "--no-eval"]
    assert main([*cut, "-o", "a"]) == 1
    assert "text: " in capsys.readouterr().err
    assert not (here / "a").exists()
    assert main([*cut, "-o", "a", "--no-refit"]) == 0
    assert main([*cut, "-o", "b", *CALIB, "--samples", "9", "--seq-len", "16", "--refit-samples", "7"]) == 0
    assert "refit" not in record_of(here / "a")
    assert record_of(here / "b")["refit"]["samples"] == 7


def test_learned_scores_from_the_command_line(here):
    cut = ["prune", "model", "-o", "out", "--ratio", "0.2", *CALIB, *SMALL, "--no-eval"]
    assert main([*cut, "--fusion", "learned", "--steps", "3"]) == 0
    record = record_of(here / "out")
    assert record["scores"]["fusion"] == "learned"
    assert record["scores"]["learned"]["steps"] == 3
    assert record["refit"]["samples"] == len(TEXT) // 16, "a fusion changes nothing but the fusion"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layout", "adaptive", "--criterion", "random"], "layout: adaptive goes with criterion 'hywia'"),
        (["--ridge", "0.1", "--no-refit"], "ridge: goes with --reconstruct"),
        (["--ridge", "-1"], "ridge: expected a positive number, got -1.0"),
        (["--refit-samples", "0"], "reconstruct_samples: expected at least 1, got 0"),
        (["--steps", "5"], "steps: goes with --fusion learned"),
        (["--fusion", "learned", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["--layout", "free"], "invalid choice: 'free'"),
    ],
)
def test_bad_recipes(here, capsys, more, message):
    try:
        code = main([*PRUNE, "--ratio", "0.2", *more])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("mlp=half", "expected 0.5 or mlp=0.6,attention=0.34, got 'mlp=half'"),
        ("mlp=1.5", "group_ratio: expected a number between 0 and 1"),
        ("norm=0.5", "group_ratio: expected some of mlp, attention"),
    ],
)
def test_bad_shares(here, capsys, share, message):
    try:
        code = main([*PRUNE, "--group-ratio", share, *CALIB, *SMALL])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
