"""`hywia prune` of a model that stays in its files, and what the commands say of one that does not fit in memory."""

from __future__ import annotations

import json

import pytest

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint.scores_file import load_measured
from hywia_kernels.cli import main, session
from hywia_kernels.compression import Measured
from tests.support.directories import contents

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
SCORING = ["--calib", "text.txt", "--samples", "4", "--seq-len", "16", "--refit-samples", "20"]
REQUEST = ["--scores", "scores", "--ratio", "0.3", "--align", "4", "--no-eval"]
ALONE = ["--search", "none", "--head-ranking", "scores"]


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(["score", "model", "-o", "scores", *SCORING]) == 0
    return tmp_path


@pytest.fixture
def too_large(monkeypatch):
    monkeypatch.setattr(session, "free_bytes", lambda device: 1000)


def without_times(folder):
    """A directory's files, the record without what two runs differ in."""
    files = contents(folder)
    record = json.loads(files.pop("hywia.json"))
    card = files.pop("README.md")
    del record["seconds"], record["arguments"], record["sha256"]
    for part in (record["plan"].get("refit", {}), record["plan"]["scores"]["statistics"]):
        part.pop("seconds", None)
    return files, record, card.count(b"\n")


@pytest.mark.parametrize("refit", ["--no-refit", "--refit"])
def test_a_model_that_does_not_fit_is_cut_from_its_files(refit, here, too_large, capsys):
    request = [*REQUEST, *ALONE, refit]
    assert main(["prune", "model", "-o", "one/out", *request, "--json", "one.json"]) == 0
    assert "cutting model from its files" in capsys.readouterr().out
    assert main(["prune", "model", "-o", "two/out", *request, "--json", "two.json", "--cut", "memory"]) == 0
    printed = capsys.readouterr().out
    assert "loading model" in printed
    assert "from its files" not in printed
    assert without_times(here / "one" / "out") == without_times(here / "two" / "out")
    one, two = (json.loads((here / f"{n}.json").read_text()) for n in ("one", "two"))
    assert one["recipe"] == two["recipe"]
    assert one["plan"]["widths"] == two["plan"]["widths"]
    assert ("refit" in one["plan"]) == (refit == "--refit")


def test_it_is_cut_in_memory_where_it_fits(here, capsys):
    assert main(["prune", "model", "-o", "out", *REQUEST, *ALONE, "--no-refit"]) == 0
    assert "from its files" not in capsys.readouterr().out
    assert main(["prune", "model", "-o", "again", *REQUEST, *ALONE, "--no-refit", "--cut", "files"]) == 0
    assert "cutting model from its files" in capsys.readouterr().out
    assert (here / "out" / "model.safetensors").read_bytes() == (here / "again" / "model.safetensors").read_bytes()


def test_what_needs_the_model_in_memory_is_named(here, too_large, capsys):
    """All of it at once, each with the way out; the units would be others without it."""
    assert main(["prune", "model", "-o", "out", "--scores", "scores", "--ratio", "0.3", "--recover"]) == 1
    error = capsys.readouterr().err
    assert "model: its weights take 0.00 GB, and cpu has 0.00 GB free; it can be cut from its files" in error
    for option in ("--search none", "--head-ranking scores", "--no-recover", "--no-eval"):
        assert option in error
    assert main(["prune", "model", "-o", "out", *REQUEST, "--search", "none", "--cut", "files"]) == 2
    error = capsys.readouterr().err
    assert "cut: expected memory, or nothing that needs the model there, got files and the ranking of heads" in error
    assert "--search none" not in error
    assert main(["prune", "model", "-o", "out", "--ratio", "0.3", "--no-eval", "--cut", "files"]) == 2
    assert "cut: files goes with --scores, which 'hywia score' writes" in capsys.readouterr().err
    assert not (here / "out").exists()


def test_another_text_for_the_reconstruction(here, too_large):
    (here / "more.txt").write_text("jumps over the lazy dog, the quick brown fox. " * 60)
    text = ["--calib", "more.txt", "--samples", "4", "--seq-len", "16", "--refit-samples", "24"]
    assert main(["prune", "model", "-o", "one/out", *REQUEST, *ALONE, *text]) == 0
    assert main(["prune", "model", "-o", "two/out", *REQUEST, *ALONE, *text, "--cut", "memory"]) == 0
    assert without_times(here / "one" / "out") == without_times(here / "two" / "out")


def test_evaluation_and_recovery_say_what_they_need(here, too_large, capsys):
    assert main(["prune", "model", "-o", "out", *REQUEST, *ALONE, "--no-refit"]) == 0
    capsys.readouterr()
    assert main(["eval", "out", "--text", "text.txt"]) == 1
    assert "model: an evaluation needs all of out in memory: its weights take" in capsys.readouterr().err
    assert main(["recover", "out", "--no-eval"]) == 1
    assert "model: recovery needs all of model in memory: its weights take" in capsys.readouterr().err


def test_python_refuses_the_same(here):
    scores, statistics, tokens, _ = load_measured("scores")
    with pytest.raises(HywiaError, match=r"recipe: not from files, .* the search for shares \(leave it out: --search"):
        hk.compress_files(
            "model", hk.Recipe(ratio=0.3, reconstruct=False), "out", measured=Measured(scores, statistics, tokens)
        )
    recipe = hk.Recipe(ratio=0.3, search="none", reconstruct=True, head_ranking="scores")
    with pytest.raises(HywiaError, match="text: the reconstruction needs 128 samples, 0 are at hand"):
        hk.compress_files("model", recipe, "out", measured=Measured(scores, statistics))
    assert not (here / "out").exists()
