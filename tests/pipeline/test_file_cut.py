"""The cut from files to files: what it refuses, what a full disk leaves, and how much memory it takes."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from faults import faults

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.checkpoint import weight_writer
from hywia_kernels.checkpoint.stored_model import open_stored
from hywia_kernels.checkpoint.weight_writer import WeightWriter
from hywia_kernels.method import file_cut, file_reconstruction
from tests.support.directories import contents
from tests.support.processes import run_python
from tests.support.tiny import TINY, Tiny, fresh, make_plan


@pytest.fixture(autouse=True)
def no_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def source(gqa, tokenizer, tmp_path):
    gqa.save_pretrained(tmp_path / "in", max_shard_size=40_000)
    tokenizer.save_pretrained(tmp_path / "in")
    return tmp_path / "in"


def test_headers_and_order_are_the_library_s(tmp_path):
    """Of all dtypes that models have, with names that JSON escapes."""
    from safetensors.torch import save_file

    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
    tensors = {f'a "{i}" ü': torch.arange(3 * i).reshape(3, i).to(kind) for i, kind in enumerate(kinds)}
    tensors["scalar"] = torch.tensor(2.5)
    empty = {name: t.to("meta") for name, t in tensors.items()}
    writer = WeightWriter(tmp_path, empty, parameters=7)
    for name in reversed(tensors):
        writer.put(name, tensors[name])
    writer.finish()
    save_file(tensors, tmp_path / "whole", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_tensor_that_is_missing_or_another_is_refused(tmp_path):
    writer = WeightWriter(
        tmp_path, {"a": torch.empty(3, device="meta"), "b": torch.empty(2, device="meta")}, parameters=5
    )
    with pytest.raises(HywiaError, match=r"save: a: expected torch\.float32 \(3,\), got torch\.float32 \(2,\)"):
        writer.put("a", torch.ones(2))
    with pytest.raises(HywiaError, match=r"save: c: expected none, got torch\.float32"):
        writer.put("c", torch.ones(2))
    writer.put("a", torch.ones(3))
    with pytest.raises(HywiaError, match=r"expected b, it was not written \(1 such tensors\)"):
        writer.finish()


def test_a_disk_that_forgets_is_noticed(source, gqa, tmp_path, monkeypatch):
    """Half of the bytes that are said to be written are not."""
    right = weight_writer.os.pwrite
    monkeypatch.setattr(
        weight_writer.os, "pwrite", lambda handle, data, at: right(handle, data[: len(data) // 2], at) and len(data)
    )
    with pytest.raises(HywiaError, match=r"model.*safetensors does not hold what was written into it"):
        hk.prune_files(source, make_plan(gqa, "both"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_model_s_plan_leaves_nothing(source, gqa, tmp_path):
    plan = make_plan(gqa, "both")
    other = make_plan(fresh(TINY[3]), "both")
    before = contents(tmp_path)
    with pytest.raises(HywiaError, match="made for another model, or this one is pruned already"):
        hk.prune_files(source, other, tmp_path / "out")
    with pytest.raises(HywiaError, match=r"made from the scores of another model \(the weights differ\)"):
        hk.prune_files(source, replace(plan, fingerprint="0" * 64), tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        hk.prune_files(source, plan, source)
    with pytest.raises(HywiaError, match="GGUF file, whose weights are packed; work from safetensors files"):
        hk.prune_files("smollm2", plan, tmp_path / "out")
    assert contents(tmp_path) == before


def test_in_place_and_overwrite(source, gqa, tmp_path):
    plan = make_plan(gqa, "both")
    hk.prune_files(source, plan, tmp_path / "out")
    want = contents(tmp_path / "out")
    hk.prune_files(source, plan, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == want
    hk.prune_files(source, plan, source, in_place=True)
    assert {n: b for n, b in contents(source).items() if n.endswith("safetensors")} == {
        n: b for n, b in want.items() if n.endswith("safetensors")
    }


@pytest.mark.parametrize("kind", ["ENOSPC", "interrupt"])
def test_a_full_disk_leaves_what_was_there(kind, tokenizer, tmp_path, monkeypatch):
    """At every third call into the operating system."""
    monkeypatch.setattr(file_cut, "_WORKERS", 1)
    model = fresh(Tiny("small", heads=2, kv_heads=1, tied=True, hidden=16, intermediate=16, layers=1))
    model.save_pretrained(tmp_path / "in", max_shard_size=15_000)
    tokenizer.save_pretrained(tmp_path / "in")
    plan = make_plan(model, "mlp")

    def write(which):
        hk.prune_files(tmp_path / "in", plan, tmp_path / "out", record={"which": which}, overwrite=True)

    write("old")
    before, hits, at = contents(tmp_path), set(), 1
    while True:
        with faults(at, kind) as counter, suppress(HywiaError, KeyboardInterrupt):
            write("new")
        if not counter.hit:
            break
        hits.add(counter.hit)
        after = contents(tmp_path)
        if '"which": "new"' in (tmp_path / "out" / "hywia.json").read_text():  # it was published before that
            assert {n for n in after if n.startswith("out/")} == {n for n in before if n.startswith("out/")}
            write("old")
        else:
            assert after == before, (at, counter.hit)
        at += 3
    assert {"pwrite", "fsync", "open for writing"} <= hits
    assert '"which": "new"' in (tmp_path / "out" / "hywia.json").read_text()


def test_memory_is_a_few_tensors(tmp_path):
    """Of a model of 29 matrices of 8 MB, about as many are never in memory at once as the machine may cut at a time."""
    printed = run_python(Path(__file__).with_name("file_cut_memory.py"), tmp_path, OMP_NUM_THREADS="1")
    peak, largest, total = map(int, printed.split())
    assert total > 25 * largest
    assert 0 < peak < 8 * largest


def test_a_refit_holds_one_layer(source, gqa, tokens, tmp_path, monkeypatch):
    """Beside what is before the layers, and the first of them, while the text enters."""
    plan, held = make_plan(gqa, "both"), []
    right = file_reconstruction.through_layers

    def watched(model, *args, weights, while_changed, **kwargs):
        def look(index, layer):
            here = {name for name, p in model.named_parameters() if not p.is_meta}
            assert here == {f"model.layers.{index}.{name}" for name, _ in layer.named_parameters()}
            held.append(index)
            while_changed(index, layer)

        with weights.entrance():
            here = {name for name, p in model.named_parameters() if not p.is_meta}
            assert {n.split(".")[1] for n in here} == {"embed_tokens", "norm", "layers"}
            assert all(".layers.0." in n for n in here if ".layers." in n)
        return right(model, *args, weights=weights, while_changed=look, **kwargs)

    monkeypatch.setattr(file_reconstruction, "through_layers", watched)
    stored = open_stored(source)
    hk.prune_files(stored, plan, tmp_path / "out", refit=tokens)
    assert held == [0, 1, 2]
    assert all(p.is_meta for p in stored.model.parameters())


def test_a_refit_of_another_model_leaves_nothing(source, gqa, tokens, tmp_path):
    plan = make_plan(gqa, "both")
    with pytest.raises(HywiaError, match="the weights differ"):
        hk.prune_files(source, replace(plan, fingerprint="0" * 64), tmp_path / "out", refit=tokens)
    with pytest.raises(UsageError, match="ridge: expected a positive number, got 0"):
        hk.prune_files(source, plan, tmp_path / "out", refit=tokens, ridge=0)
    with pytest.raises(UsageError, match="device: expected auto, cpu, cuda or cuda:N, got 'tpu'"):
        hk.prune_files(source, plan, tmp_path / "out", refit=tokens, device="tpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("after", [0, 9, 20])
def test_a_disk_that_fills_up_during_a_refit(after, source, gqa, tokens, tmp_path, monkeypatch):
    """Layers are written by another thread than the one that solves."""
    plan, before = make_plan(gqa, "both"), contents(tmp_path)
    right, calls = weight_writer.os.pwrite, []

    def full(*args):
        calls.append(args)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return right(*args)

    monkeypatch.setattr(weight_writer.os, "pwrite", full)
    with pytest.raises(HywiaError, match=r"output: c.* No space left on device"):
        hk.prune_files(source, plan, tmp_path / "out", refit=tokens)
    assert len(calls) > after
    monkeypatch.undo()
    assert contents(tmp_path) == before
