"""`hywia prune --dry-run`, recipes in files, and what the command line understands."""

from __future__ import annotations

import json

import pytest

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.cli import main

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
SMALL = ["--calib", "text.txt", "--samples", "4", "--seq-len", "16", "--align", "4", "--no-eval"]


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def test_a_dry_run_reads_no_weights_and_writes_nothing(here, monkeypatch, capsys):
    monkeypatch.setattr("hywia_kernels.cli.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    before = sorted(p.name for p in here.iterdir())
    assert main(["prune", "model", "--ratio", "20%", *SMALL, "--dry-run", "--json", "d.json"]) == 0
    assert sorted(p.name for p in here.iterdir() if p.name != "d.json") == before
    report = json.loads((here / "d.json").read_text())
    out = capsys.readouterr().out
    assert "removing " in out
    assert "will take about " in out
    assert report["estimate"]["memory_bytes"] > report["estimate"]["disk_bytes"] > 0
    assert abs(report["plan"]["removed_ratio"] - 0.2) < 0.03
    assert report["recipe"]["reconstruct"] is True


def test_a_dry_run_with_stored_scores_shows_the_runs_own_widths(here, capsys):
    assert main(["score", "model", "-o", "scores", *SMALL[:6]]) == 0
    cut = ["prune", "model", "--group-ratio", "0.5", "--scores", "scores", "--align", "4", "--no-eval"]
    cut += ["--head-ranking", "scores"]
    assert main([*cut, "--dry-run", "--json", "d.json"]) == 0
    assert main([*cut, "-o", "out", "--json", "r.json"]) == 0
    dry, real = (json.loads((here / f).read_text())["plan"] for f in ("d.json", "r.json"))
    assert dry["widths"] == real["widths"]
    assert dry["parameters_after"] == real["parameters_after"]


def test_a_dry_run_says_what_a_search_takes(here, capsys):
    found = {}
    for effort in ("none", "fast", "thorough"):
        flags = ["prune", "model", "--ratio", "30%", *SMALL, "--search", effort, "--layout", "adaptive"]
        assert main([*flags, "--dry-run", "--json", "d.json"]) == 0
        found[effort] = json.loads((here / "d.json").read_text())["estimate"]
        said = f"at most 5 are tried (--search {effort})" in capsys.readouterr().out
        assert said == (effort != "none")
    assert [found[e]["trials"] for e in ("none", "fast", "thorough")] == [0, 5, 5]
    assert "searching" not in found["none"]["seconds"]
    assert 0 < found["fast"]["seconds"]["searching"] < found["thorough"]["seconds"]["searching"]


def test_a_dry_run_refuses_what_the_run_would(here, capsys):
    assert main(["prune", "model", "--ratio", "0.99", *SMALL, "--dry-run"]) == 2
    assert "ratio: 0.99 cannot be reached" in capsys.readouterr().err
    assert main(["prune", "model", "--ratio", "0.2", *SMALL]) == 2
    assert "output: expected a directory to write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune", "model", "-o", "out", "--ration", "0.2"], "did you mean --ratio?"),
        (["prune", "model", "-o", "out", "--ratio", "0.2", "--trust-remote"], None),
        (["prune", "model", "-o", "out", "--ratio", "0.2", "--head-rankings=scores"], "did you mean --head-ranking?"),
        (["prune", "model", "-o", "out", "--ratio", "half"], "expected a share such as 0.2 or 20%, got 'half'"),
        (["prune", "model", "-o", "out", "--group-ratio", "mpl=0.5"], "did you mean 'mlp'?"),
    ],
)
def test_what_was_meant(here, capsys, words, said):
    try:
        code = main([*words, *SMALL])
    except SystemExit as stop:
        code = stop.code
    if said is None:
        assert code == 0, "unambiguous beginnings of options are taken"
    else:
        assert code == 2
        assert said in capsys.readouterr().err


def test_recipes_in_files(tmp_path):
    recipe = hk.Recipe(group_ratio={"mlp": 0.5}, layers=(1, 3), fusion="fine", serve=("vllm",), seed=4)
    recipe.write(tmp_path / "r.json")
    assert hk.Recipe.read(tmp_path / "r.json") == recipe
    assert hk.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    resolved = recipe.resolved("cpu")
    assert (resolved.layout, resolved.head_ranking, resolved.reconstruct, resolved.reconstruct_samples) == (
        "adaptive",
        "residual",
        True,
        128,
    )
    assert recipe.resolved("cuda").reconstruct_samples == 1024
    assert resolved.resolved("cuda") == resolved


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratio": 0.2, "sample": 3}, "unknown setting 'sample'; did you mean 'samples'?"),
        ({"ratio": 0.2, "fusion": "fines"}, "fusion: expected one of .*; did you mean 'fine'?"),
        ({"ratio": "a"}, "ratio: expected a number between 0 and 1"),
        ({"ratio": True}, "ratio: expected a number between 0 and 1"),
        ({"ratio": 0.2, "samples": 1.5}, "samples: expected a whole number of at least 1, got 1.5"),
        ({"ratio": 0.2, "group_ratio": 0.3}, "ratio: expected exactly one of ratio and group_ratio"),
        ({"ratio": 0.2, "layers": [1, 2]}, "layers: goes with group_ratio"),
        ({"ratio": 0.2, "units": "mlp"}, "units: expected a list"),
        ({"ratio": 0.2, "reconstruct": "yes"}, "reconstruct: expected true, false or null"),
        ({"ratio": 0.2, "criterion": "random", "layout": "adaptive"}, "layout: adaptive goes with criterion 'hywia'"),
        ({"ratio": 0.2, "ridge": float("nan")}, "ridge: expected a positive number"),
        ({"group_ratio": {}}, "group_ratio: expected kinds and their shares, got none"),
    ],
)
def test_recipes_that_contradict_themselves(values, message):
    with pytest.raises(UsageError, match=message):
        hk.Recipe.from_dict(values).check()


def test_files_that_hold_no_recipe(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "b.json").write_text('{"versions": {}}')
    for name, message in (("a.json", "expected an object"), ("b.json", "kept no recipe"), ("c.json", "cannot read")):
        with pytest.raises(HywiaError, match=message):
            hk.Recipe.read(tmp_path / name)


def test_progress_is_told(here):
    model, tokenizer = hk.load("model")
    told = []
    recipe = hk.Recipe(ratio=0.2, align=4, calibration="text.txt", samples=4, seq_len=16)
    result = hk.compress(model, tokenizer, recipe, on_progress=lambda *step: told.append(step))
    assert {"scoring", "cutting"} <= {what for what, _, _ in told}
    assert all(done <= total for _, done, total in told if total is not None)
    assert result.record["recipe"] == result.recipe.to_dict()
    assert result.before is None
