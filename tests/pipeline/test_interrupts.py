"""Ctrl-C, SIGTERM, a closed pipe and memory that runs out: exit codes, and what is said of the disk."""

from __future__ import annotations

import importlib
import os
import signal
import sys

import pytest
import torch
from faults import contents

import hywia_kernels as hk
from hywia_kernels import evaluation
from hywia_kernels.checkpoint import saving
from hywia_kernels.cli import console, main, session
from hywia_kernels.compression import job
from hywia_kernels.method import equations, reconstruction
from tests.support.tiny import TINY, fresh

SMALL = ["--ratio", "0.2", "--criterion", "random", "--align", "4", "--text", "text.txt", "--block", "16"]


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    yield tmp_path
    signal.signal(signal.SIGINT, before)


def _stop_at(monkeypatch, owner, name, call, how):
    """The call number `call` of a function is where the signal comes."""
    function, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            how()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, stopping)


def _interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    signal.sigtimedwait([], 5)  # Python's handler runs at the next step at the latest


def _terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    signal.sigtimedwait([], 5)


@pytest.mark.parametrize(("how", "code", "word"), [(_interrupt, 130, "interrupted"), (_terminate, 143, "SIGTERM")])
def test_an_end_says_what_is_on_the_disk(here, monkeypatch, capsys, how, code, word):
    before = signal.getsignal(signal.SIGTERM)
    run = ["prune", "model", "-o", "out", *SMALL]
    for owner, name, call, said in (
        (session, "load", 1, "nothing was written"),
        (saving, "write_model", 1, "nothing was written"),
        (saving, "check_written", 1, "nothing was written"),
        (
            evaluation,
            "evaluate",
            2,
            f"{here / 'out'} is written and complete; what was to come after that was not done",
        ),
    ):
        with monkeypatch.context() as patch:
            _stop_at(patch, owner, name, call, how)
            assert main(run) == code
        error = capsys.readouterr().err
        assert f"hywia: error: {'ended by ' if code == 143 else ''}{word}; {said}\n" in error
        assert (here / "out").exists() == ("complete" in said)
        assert sorted(p.name for p in here.iterdir() if p.name != "out") == ["model", "text.txt"]
    assert signal.getsignal(signal.SIGTERM) == before
    whole = contents(here / "out")
    hk.load("out")
    with monkeypatch.context() as patch:
        _stop_at(patch, saving, "write_model", 1, how)
        assert main([*run, "--overwrite"]) == code
    assert f"nothing was written; {here / 'out'} is as it was before" in capsys.readouterr().err
    assert contents(here / "out") == whole
    with monkeypatch.context() as patch:
        _stop_at(patch, session, "load", 1, how)
        assert main(["export", "model", "-o", "other", "--format", "decilm"]) == code
    assert "nothing was written" in capsys.readouterr().err


def test_nobody_reads_the_output(here, monkeypatch, capfd):
    def closed(line):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(console, "say", closed)
    assert main(["info"]) == 141
    assert capfd.readouterr().err == ""
    assert main(["prune", "model", "-o", "out", *SMALL]) == 141
    assert "nobody reads the output any more; nothing was written" in capfd.readouterr().err
    assert not (here / "out").exists()


def test_a_pipe_that_is_closed(here):
    """Through a real descriptor: nothing is flushed into it again at the end of the process."""
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(writer, 1)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            code = main(["info"])
            sys.stdout.flush()
        finally:
            os._exit(code)
    os.close(writer)
    os.close(kept)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 141


def _out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


def _on_the_cpu(*args, **kwargs):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("how", [_out_of_memory, _on_the_cpu])
@pytest.mark.parametrize(
    ("where", "lever"),
    [
        ("hywia_kernels.checkpoint.saving.check_written", "the model itself barely fits"),
        ("hywia_kernels.evaluation.perplexity", "try a smaller --block"),
        ("hywia_kernels.compression.measuring.calibrate", "fewer --samples, a shorter --seq-len"),
    ],
)
def test_memory_that_runs_out_names_the_lever(here, monkeypatch, capsys, how, where, lever):
    module, _, name = where.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, how)
    run = ["prune", "model", "-o", "out", "--ratio", "0.2", "--calib", "text.txt", "--samples", "3", "--seq-len", "16"]
    assert main([*run, "--align", "4", "--text", "text.txt", "--block", "16", "--no-refit"]) == 1
    error = capsys.readouterr().err
    assert "hywia: error: out of memory (" in error
    assert lever in error
    assert "nothing was written" in error


def test_the_refits_memory_has_its_own_lever(here, monkeypatch, capsys):
    monkeypatch.setattr(equations.NormalEquations, "solve", _out_of_memory)
    run = ["prune", "model", "-o", "out", "--ratio", "0.2", "--calib", "text.txt", "--samples", "3", "--seq-len", "16"]
    assert main([*run, "--align", "4", "--no-eval", "--units", "mlp"]) == 1
    assert "try fewer --reconstruct-samples" in capsys.readouterr().err
    assert job.reconstruct is reconstruction.reconstruct


def test_other_refusals_of_the_system_are_messages(here, monkeypatch, capsys):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "model/config.json")

    monkeypatch.setattr(session, "load", refused)
    assert main(["eval", "model", "--text", "text.txt"]) == 1
    assert "hywia: error: model/config.json: Permission denied; nothing was written" in capsys.readouterr().err


def test_a_model_that_was_saved_is_not_this_commands(here):
    """What a program wrote before it called the command line is none of the command's outcome."""
    from hywia_kernels.checkpoint import atomic_directory

    hk.save(fresh(TINY[2]), None, here / "own")
    assert "own is written and complete" in atomic_directory.outcome()
    assert main(["eval", "nowhere/at/all"]) == 1
    assert atomic_directory.outcome() == "nothing was written"
