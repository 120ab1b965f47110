"""`hywia score` and `prune` streamed, shared among processes, killed and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.cli import main
from hywia_kernels.cli import streaming as commands
from tests.support.tiny import TINY, fresh
from tests.support.tokenizers import byte_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = "the quick brown fox jumps over the lazy dog. " * 90
SCORING = ("--calib", "text.txt", "--samples", "11", "--seq-len", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, a text, and what the command makes of them in one process, streamed."""
    folder = tmp_path_factory.mktemp("scale")
    fresh(TINY[2]).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    assert command(folder, 1, "score", "model", "-o", "alone", *SCORING, "--memory", "streamed").returncode == 0
    return folder


def command(folder, processes, *arguments, module=("hywia_kernels",)):
    """The command in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, *launcher, "-m", *module, *map(str, arguments)]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)


def same(one: Path, other: Path) -> bool:
    pair = [hk.load_scores(path) for path in (one, other)]
    return all(torch.equal(pair[0][0].values[n], pair[1][0].values[n]) for n in pair[0][0].values) and all(
        torch.equal(pair[0][1].moments[n], pair[1][1].moments[n]) for n in pair[0][1].moments
    )


def test_the_scores_are_those_of_an_ordinary_scoring(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["score", "model", "-o", "ordinary", *SCORING]) == 0
    scores = [hk.load_scores(folder / name)[0] for name in ("alone", "ordinary")]
    for group in scores[0].groups:
        one, other = (s.values[group.name] for s in scores)
        assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max())
    plans = [hk.plan(s, group_ratio=0.5) for s in scores]
    assert all(torch.equal(plans[0].keep[n], plans[1].keep[n]) for n in plans[0].keep)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_with_one_message_and_its_work_goes_on(folder, rank):
    output = f"killed-{rank}"
    arguments = ("score", "model", "-o", output, *SCORING)
    killed = command(folder, 2, "killed", rank, 1, *arguments, module=("tests.scale.killed_rank",))
    assert killed.returncode != 0
    said = [line for line in killed.stderr.splitlines() if line.startswith("hywia: error:")]
    assert len(said) == 1
    assert f"rank {rank} (process " in said[0]
    assert "ended" in said[0]
    assert not (folder / output).exists()
    work = folder / f".{output}.hywia-scoring"
    assert json.loads((work / "state.json").read_text())["layer"] == 1
    again = command(folder, 1, *arguments, "--memory", "streamed", "--weights", "files")
    assert again.returncode == 0, again.stderr
    assert "streamed by one process in 8 runs, on from layer 1:" in again.stdout
    assert same(folder / output, folder / "alone")
    assert not work.exists()


def named(run):
    """The one error that a run ended with, which names its second rank."""
    assert run.returncode != 0
    (said,) = [line for line in run.stderr.splitlines() if line.startswith("hywia: error:")]
    assert "rank 1 (process " in said
    return said


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_the_run_ends(folder):
    arguments = ("score", "model", "-o", "hung", *SCORING, "--rank-timeout", "5")
    hung = command(folder, 2, "hangs", 1, 1, *arguments, module=("tests.scale.killed_rank",))
    assert "did not come to layer 0 within 5 s of the others; it hangs" in named(hung)
    assert json.loads((folder / ".hung.hywia-scoring" / "state.json").read_text())["layer"] == 1


@pytest.mark.slow
def test_a_rank_that_is_lost_while_operands_change_hands_is_named(folder):
    arguments = ("score", "model", "-o", "lost", *SCORING, "--order", "first")
    lost = command(folder, 2, "lost", 1, 10, *arguments, module=("tests.scale.killed_rank",))
    named(lost)
    assert not (folder / "lost").exists()
    again = command(folder, 2, *arguments)
    assert again.returncode == 0, again.stderr
    assert ", on from layer 2:" in again.stdout


@pytest.mark.slow
def test_all_orders_are_shared(folder):
    for processes in (1, 2):
        done = command(
            folder,
            processes,
            "score",
            "model",
            "-o",
            f"first-{processes}",
            *SCORING,
            "--order",
            "first",
            "--memory",
            "streamed",
        )
        assert done.returncode == 0, done.stderr
    statistics = [hk.load_scores(folder / f"first-{processes}")[1] for processes in (1, 2)]
    assert [s.orders for s in statistics] == [("first",), ("first",)]
    for group in statistics[0].groups:
        one, other = (s.fine[group.name]["first"] for s in statistics)
        assert torch.equal(one, other)
        assert float(one.min()) > 0.0
    assert same(folder / "first-1", folder / "first-2")
    assert not same(folder / "first-1", folder / "alone")


@pytest.mark.slow
def test_processes_of_a_host_hold_the_weights_together(folder):
    done = command(folder, 2, "score", "model", "-o", "together", *SCORING, "--weights", "host")
    assert done.returncode == 0, done.stderr
    assert "its layers' weights stay in the host's memory" in done.stdout
    assert same(folder / "together", folder / "alone")


@pytest.mark.slow
def test_only_the_first_process_prints_and_writes(folder):
    shared = command(folder, 2, "score", "model", "-o", "shared", *SCORING)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("wrote shared") == 1
    assert shared.stdout.count("loading model") == 1
    assert shared.stderr.count("scoring: done") == 1
    assert same(folder / "shared", folder / "alone")
    again = command(folder, 2, "score", "model", "-o", "shared", *SCORING)
    assert again.returncode != 0
    assert [line for line in again.stderr.splitlines() if line.startswith("hywia: error:")] == [
        f"hywia: error: output: {folder / 'shared'} exists; choose another directory, or pass --overwrite"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["second", "first"])
def test_prune_shares_its_scoring(folder, order):
    arguments = ("--ratio", "0.3", "--search", "none", "--refit-samples", "8", "--align", "4", "--no-eval", *SCORING)
    arguments += ("--order", order)
    names = [f"{order}-alone", f"{order}-shared"]
    for processes, name in enumerate(names, 1):
        done = command(folder, processes, "prune", "model", "-o", name, *arguments, "--memory", "streamed")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"wrote {name}") == 1
    weights = [(folder / name / "model.safetensors").read_bytes() for name in names]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "autograd", "--memory", "streamed"], "engine: expected auto or fused for a streamed scoring"),
        (["--criterion", "magnitude", "--memory", "streamed"], "memory: goes with --criterion hywia"),
        (["--memory", "lean", "--weights", "files"], "memory: expected auto or streamed for --weights files, got lean"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(folder)
    scoring = SCORING if "magnitude" not in arguments else SCORING[2:]
    assert main(["score", "model", "-o", "never", *scoring, *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "never").exists()


def test_prune_says_what_it_needs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["prune", "model", "-o", "never", "--ratio", "0.3", "--weights", "files", *SCORING]) == 2
    assert "score it first ('hywia score ... -o SCORES'), then prune it with --scores" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_streamed(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("hywia_kernels.scale.place.free_on_host", lambda: 50_000)  # of weights of 200 kB
    assert main(["score", "model", "-o", "small", *SCORING]) == 0
    assert "loading model; its layers' weights stay in their files" in capsys.readouterr().out
    assert same(folder / "small", folder / "alone")


def test_other_commands_take_one_process(folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval", str(folder / "model")]) == 2
    assert "eval: expected one process, got 2; torchrun goes with score and prune" in capsys.readouterr().err


def test_devices_are_one_a_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert commands.device_of_rank("auto") == torch.device("cuda", 1)
    with pytest.raises(hk.UsageError, match="device: expected auto, cpu or cuda for 2 processes"):
        commands.device_of_rank("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(hk.UsageError, match="process 1 of this host has no CUDA device, there are 1"):
        commands.device_of_rank("auto")
