"""Kills, full disks and failing ones at every step of writing a model and scores: nothing half, nothing lost."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
import transformers
from faults import contents, faults, killed_at
from tiny import Tiny, fresh

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint import atomic_directory, disk
from hywia_kernels.checkpoint.weight_files import stored_tensors
from hywia_kernels.cli import main
from hywia_kernels.types.record import sealed


@pytest.fixture(autouse=True)
def no_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


SMALL = Tiny("small", heads=2, kv_heads=1, tied=True, hidden=16, intermediate=16, layers=1)


def _scores(seed: int):
    return hk.score(fresh(SMALL), criterion="random", seed=seed)


def _model(value: float):
    model = fresh(SMALL)
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    return model


@pytest.fixture(params=["save", "score"])
def writer(request, tokenizer):
    """`write(out, which)`: two different models, or sets of scores."""
    if request.param == "save":
        models = {"old": _model(0.25), "new": _model(0.5)}
        return lambda out, which: hk.save(models[which], tokenizer, out, overwrite=True)
    scores = {"old": _scores(1), "new": _scores(2)}
    return lambda out, which: hk.save_scores(out, scores[which], overwrite=True)


def _loads(folder) -> bool:
    """As far as the files go: what a loader asks of them."""
    if (folder / "scores.json").exists():
        try:
            hk.load_scores(folder)
        except HywiaError:
            return False
        return True
    try:
        json.loads((folder / "config.json").read_text())
        stored_tensors(folder)
    except (OSError, ValueError, HywiaError):
        return False
    return True


def _check(parent, whole, earlier: bool, at_once: bool) -> None:
    """What a fault may leave, and what the next run must make of it."""
    out = parent / "out"
    for folder in (p for p in parent.rglob("*") if p.is_dir()):
        assert not _loads(folder) or contents(folder) in whole, f"{folder} loads and is not whole"
    if out.exists():
        assert contents(out) in whole
    elif at_once and earlier:
        raise AssertionError("the earlier result is gone")
    atomic_directory.check_target(out, overwrite=True)
    assert [p.name for p in parent.iterdir()] == (["out"] if earlier or out.exists() else []), "something is left over"
    if earlier or out.exists():
        assert contents(out) in whole


@pytest.fixture(params=[(False, True), (True, True), (True, False)], ids=["first", "exchange", "two-renames"])
def setting(request, tmp_path, writer, monkeypatch):
    """`(parent, whole, earlier, write)`: fresh directories, with an earlier result or without."""
    earlier, exchanges = request.param
    if not exchanges:  # an old kernel, or a filesystem without such renames
        monkeypatch.setattr(disk, "_renameat2", lambda *args: False)
    for which in ("old", "new"):  # under the name that they will have, which a model's card says
        (tmp_path / which).mkdir()
        writer(tmp_path / which / "out", which)
    whole = [contents(tmp_path / which / "out") for which in ("old", "new")]

    def parent(name):
        folder = tmp_path / name
        folder.mkdir()
        if earlier:
            shutil.copytree(tmp_path / "old" / "out", folder / "out")
        return folder

    return parent, whole, earlier, lambda folder: writer(folder / "out", "new"), exchanges


def test_a_kill_at_every_step(setting):
    parent, whole, earlier, write, exchanges = setting
    step = 0
    while True:
        step += 1
        folder = parent(str(step))
        came = killed_at(step, lambda folder=folder: write(folder))
        _check(folder, whole, earlier, at_once=exchanges)
        if not came:
            break
    assert step > 20, "the faults must reach every part of the work"
    assert contents(folder / "out") == whole[1]


@pytest.mark.parametrize("kind", ["ENOSPC", "EIO"])
def test_an_error_at_every_step(setting, kind):
    parent, whole, earlier, write, _ = setting
    step, refused = 0, 0
    while True:
        step += 1
        folder = parent(str(step))
        said = ""
        with faults(step, kind) as counter:
            try:
                write(folder)
            except HywiaError as error:
                said = str(error)
        if said:
            refused += 1
            assert "No space left on device" in said or "Input/output error" in said, said
            want = whole[1] if "is written and complete" in said else whole[0] if earlier else None
            assert (contents(folder / "out") if (folder / "out").exists() else None) == want, f"step {step}: {said}"
        _check(folder, whole, earlier, at_once=True)
        if counter.calls < step:
            break
    assert refused > 10
    assert contents(folder / "out") == whole[1]


def test_an_interrupt_at_every_step_says_what_is_there(setting):
    parent, whole, earlier, write, _ = setting
    step = 0
    while True:
        step += 1
        folder = parent(str(step))
        atomic_directory.begin()
        with faults(step, "interrupt") as counter:
            try:
                write(folder)
            except KeyboardInterrupt:
                said, out = atomic_directory.outcome(), folder / "out"
                have = contents(out) if out.exists() else None
                if "is written and complete" in said:
                    assert have == whole[1]
                elif "as it was before" in said:
                    assert have == whole[0]
                else:
                    assert said == "nothing was written"
                    assert have == (whole[0] if earlier else None)
        _check(folder, whole, earlier, at_once=True)
        if counter.calls < step:
            break
    assert step > 20


def test_what_a_killed_run_set_aside_is_put_back_before_the_next_one_writes(tmp_path):
    """As releases before the lock left it, and as this one does."""
    for name in (".out.hywia-partial-4194999-abc", ".out.hywia-partial"):
        old = tmp_path / name / "old"
        old.mkdir(parents=True)
        (old / "config.json").write_text('{"model_type": "llama"}')
        (old / "model.safetensors").write_text("the only copy")

        def full():
            with atomic_directory.directory(tmp_path / "out", overwrite=True):
                assert (tmp_path / "out" / "model.safetensors").read_text() == "the only copy"
                raise OSError(28, "No space left on device")

        with pytest.raises(HywiaError, match="No space left"):
            full()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert (tmp_path / "out" / "model.safetensors").read_text() == "the only copy"
        with pytest.raises(hk.UsageError, match="exists; choose another directory"):
            atomic_directory.check_target(tmp_path / "out", overwrite=False)
        for file in (tmp_path / "out").iterdir():
            file.unlink()
        (tmp_path / "out").rmdir()


def test_neither_is_deleted_where_something_else_took_the_place(tmp_path):
    for part in ("old", "new"):
        (tmp_path / ".out.hywia-partial" / part).mkdir(parents=True)
    (tmp_path / ".out.hywia-partial" / "old" / "model.safetensors").write_text("earlier")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(HywiaError, match=r"old is an earlier result, set aside by a run .* move one of them away"):
        atomic_directory.check_target(tmp_path / "out", overwrite=True)
    assert (tmp_path / ".out.hywia-partial" / "old" / "model.safetensors").read_text() == "earlier"
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("step", range(1, 200, 9))
def test_a_fault_in_a_record_keeps_the_old_one(tmp_path, step):
    from hywia_kernels.checkpoint.saving import add_to_record, read_record

    hk.save(_model(0.25), None, tmp_path / "out")
    before, card = read_record(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    for at in range(step, step + 9):
        killed_at(at, lambda: add_to_record(tmp_path / "out", {"bench": 1}))
        assert read_record(tmp_path / "out") in (before, sealed({**before, "bench": 1}))
        assert (tmp_path / "out" / "README.md").read_text() == card
        atomic_directory.check_target(tmp_path / "out", overwrite=True)  # what is left over is known to be ours


def test_a_full_disk_is_a_message(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = os.statvfs(tmp_path)
    full = os.statvfs_result((state.f_bsize, state.f_frsize, state.f_blocks, 1, 1, *state[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    assert main(["prune", "model", "-o", "new/out", "--ratio", "0.2"]) == 1
    assert "output: expected 0.2 MB of free space in" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
