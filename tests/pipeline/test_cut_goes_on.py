"""A cut from files to files that was stopped goes on, and ends in the bytes of one that was not."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import transformers

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint import weight_writer
from hywia_kernels.checkpoint.cut_progress import CutProgress
from hywia_kernels.checkpoint.stored_model import StoredModel
from hywia_kernels.method import file_cut
from tests.support.cuts import make_plan
from tests.support.directories import contents
from tests.support.processes import run_python


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setattr(file_cut, "_WORKERS", 1)
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def job(gqa, tokenizer, tokens, tmp_path):
    """`(model's directory, plan, tokens)`, and the same in a file for another process."""
    gqa.save_pretrained(tmp_path / "in", max_shard_size=40_000)
    tokenizer.save_pretrained(tmp_path / "in")
    plan = make_plan(gqa, "both")
    torch.save({"plan": plan, "tokens": tokens}, tmp_path / "job.pt")
    return tmp_path / "in", plan, tokens


def written(folder: Path) -> dict[str, bytes]:
    """The files of a model, its record without the seconds."""
    files = contents(folder)
    record = json.loads(files.pop("hywia.json"))
    del record["sha256"]  # of the record itself
    record["plan"].get("refit", {}).pop("seconds", None)
    files["README.md"] = files["README.md"][:0]  # which tells the seconds
    return {**files, "record": json.dumps(record).encode()}


def kept(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.hywia-partial"


@pytest.fixture
def reads(monkeypatch):
    """The parameters that are read, in order."""
    seen, read = [], StoredModel.read

    def noted(self, bundle):
        values = read(self, bundle)
        seen.extend(values)
        return values

    monkeypatch.setattr(StoredModel, "read", noted)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("what", "states"), [("refit", 1), ("refit", 2), ("refit", 4), ("cut", 3)])
def test_a_killed_cut_ends_in_the_same_bytes(what, states, job, tmp_path, reads):
    source, plan, tokens = job
    refit = tokens if what == "refit" else None
    script, job_file = Path(__file__).with_name("cut_and_die.py"), tmp_path / "job.pt"
    with pytest.raises(AssertionError):
        run_python(script, source, job_file, tmp_path / "out", str(states), what)
    assert not (tmp_path / "out").exists()
    assert any(kept(tmp_path / "out").glob("progress-*/state.json"))
    hk.prune_files(source, plan, tmp_path / "out", refit=refit)
    again = [name for name in reads if ".layers." in name]
    assert not kept(tmp_path / "out").exists()
    hk.prune_files(source, plan, tmp_path / "whole", refit=refit)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    layers = {int(name.split(".")[2]) for name in again}
    if what == "refit":  # the first one is looked into while the text enters
        assert layers == {0, *range(min(states, 3), 3)}


def test_a_full_disk_loses_nothing_that_was_finished(job, tmp_path, monkeypatch, reads):
    source, plan, tokens = job
    hk.prune_files(source, plan, tmp_path / "whole", refit=tokens)
    right, keep, states = weight_writer.os.pwrite, CutProgress.keep, []

    def counted(self, *arguments):
        keep(self, *arguments)
        states.append(arguments[-1])

    def full(*arguments):
        if len(states) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return right(*arguments)

    monkeypatch.setattr(CutProgress, "keep", counted)
    monkeypatch.setattr(weight_writer.os, "pwrite", full)
    with pytest.raises(HywiaError, match=r"No space left on device; what was finished is kept in .*, and the same"):
        hk.prune_files(source, plan, tmp_path / "out", refit=tokens, every=0.0)
    monkeypatch.setattr(weight_writer.os, "pwrite", right)
    assert states == [1, 2]
    assert not (tmp_path / "out").exists()
    reads.clear()
    hk.prune_files(source, plan, tmp_path / "out", refit=tokens)
    assert {name.split(".")[2] for name in reads if ".layers." in name} == {"0", "2"}
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert not kept(tmp_path / "out").exists()


@pytest.fixture
def stopped(job, tmp_path, monkeypatch):
    """A reconstruction that was interrupted after its first state."""
    source, plan, tokens = job
    keep = CutProgress.keep

    def interrupted(self, *arguments):
        keep(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(CutProgress, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hk.prune_files(source, plan, tmp_path / "out", refit=tokens, every=0.0)
    monkeypatch.setattr(CutProgress, "keep", keep)
    assert (kept(tmp_path / "out") / "kept").is_dir()
    return job


@pytest.mark.parametrize("change", ["ridge", "text", "plan", "files"])
def test_another_request_begins_anew(change, stopped, gqa, tmp_path, reads):
    source, plan, tokens = stopped
    ridge = 3.0 if change == "ridge" else 4.0
    tokens = tokens.flip(1) if change == "text" else tokens
    plan = make_plan(gqa, "mlp") if change == "plan" else plan
    if change == "files":
        os.utime(next(source.glob("*.safetensors")), (1, 1))
    hk.prune_files(source, plan, tmp_path / "out", refit=tokens, ridge=ridge)
    assert {name.split(".")[2] for name in reads if ".layers." in name} == {"0", "1", "2"}
    hk.prune_files(source, plan, tmp_path / "whole", refit=tokens, ridge=ridge)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert not kept(tmp_path / "out").exists()


def test_another_writer_of_the_target_removes_what_was_kept(stopped, gqa, tokenizer, tmp_path):
    hk.save(gqa, tokenizer, tmp_path / "out")
    assert not kept(tmp_path / "out").exists()
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_was_kept_and_is_damaged_is_named(stopped, tmp_path):
    source, plan, tokens = stopped
    next(kept(tmp_path / "out").glob("progress-*/hidden-00001.safetensors")).write_bytes(b"nothing")
    with pytest.raises(HywiaError, match=r"hidden-00001.safetensors is damaged .*; remove"):
        hk.prune_files(source, plan, tmp_path / "out", refit=tokens)
    shard = next((kept(tmp_path / "out") / "kept").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(HywiaError, match=r"is not as a stopped run has begun it; remove"):
        hk.prune_files(source, plan, tmp_path / "out", refit=tokens)


def test_files_that_were_not_scored_leave_nothing(job, tmp_path):
    from dataclasses import replace

    source, plan, tokens = job
    with pytest.raises(HywiaError, match="the weights differ"):
        hk.prune_files(source, replace(plan, fingerprint="0" * 64), tmp_path / "out", refit=tokens, every=0.0)
    assert not kept(tmp_path / "out").exists()
