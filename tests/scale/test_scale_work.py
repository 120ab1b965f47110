"""What a stopped scoring leaves, and what goes on from it."""

from __future__ import annotations

import errno
import json

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.scale import work as module
from hywia_kernels.scale.ranks import Ranks
from hywia_kernels.scale.work import Work
from tests.support.families import fresh_named, token_ids


def scored(model, folder=None, ids=None, **how):
    return hk.calibrate_streamed(model, token_ids() if ids is None else ids, work=folder, every=0.0, **how)


def equal(one, other) -> bool:
    return all(
        torch.equal(one.fine[g.name]["second"], other.fine[g.name]["second"])
        and torch.equal(one.moments[g.name], other.moments[g.name])
        for g in one.groups
    )


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A folder in which two of three layers are finished, since the disk was full for the third."""
    real = module.save_file

    def full(tensors, file):
        if "layer-00000" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(hk.HywiaError, match=r"work: cannot write .*No space left on device"):
        scored(fresh_named("llama"), tmp_path / "work")
    monkeypatch.setattr(module, "save_file", real)
    return tmp_path / "work"


def test_a_full_disk_loses_nothing_that_was_finished(stopped):
    assert json.loads((stopped / "state.json").read_text())["layer"] == 1
    again = scored(fresh_named("llama"), stopped)
    assert again.record["resumed_at"] == 1
    assert equal(again, scored(fresh_named("llama")))
    assert not stopped.exists()


def test_a_finished_scoring_is_kept_for_whom_it_is_to_be_written(tmp_path):
    first = scored(fresh_named("llama"), tmp_path / "work", keep_work=True)
    again = scored(fresh_named("llama"), tmp_path / "work", keep_work=True)
    assert (first.record["resumed_at"], again.record["resumed_at"]) == (None, 0)
    assert equal(first, again)
    assert (first.fingerprint, first.parameters) == (again.fingerprint, again.parameters)
    assert first.record["loss"] == again.record["loss"]


def test_other_weights_are_refused(stopped):
    model = fresh_named("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[3, 5] += 1.0
    with pytest.raises(
        hk.HywiaError, match=r"layers.0.mlp.gate_proj: has other weights than when this scoring was stopped; remove"
    ):
        scored(model, stopped)


def test_another_text_begins_anew(stopped):
    ids = token_ids().flip(1)
    again = scored(fresh_named("llama"), stopped, ids)
    assert again.record["resumed_at"] is None
    assert equal(again, scored(fresh_named("llama"), ids=ids))


def test_a_state_without_its_files_begins_anew(stopped):
    (stopped / "gradient-00001-00002.safetensors").unlink()
    again = scored(fresh_named("llama"), stopped)
    assert again.record["resumed_at"] is None


def test_a_damaged_file_is_named(stopped):
    (stopped / "layer-00002.safetensors").write_bytes(b"nothing")
    with pytest.raises(hk.HywiaError, match=r"work: .*layer-00002.safetensors is damaged .*; remove"):
        scored(fresh_named("llama"), stopped)


def test_a_short_scoring_writes_no_state(tmp_path):
    hk.calibrate_streamed(fresh_named("llama"), token_ids(), work=tmp_path / "work", keep_work=True)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["request.json"]


class Apart(Ranks):
    """Two processes of which the other does not see the folder."""

    def tell(self, value, what):
        return [value, value if what == "the work folder" else False]


def test_processes_that_do_not_see_one_folder_keep_nothing(tmp_path):
    work = Work(tmp_path / "work", {"a": 1}, Apart(), every=0.0)
    assert (work.folder, work.state) == (None, {})
    assert not work.due(2)
    assert not (tmp_path / "work").exists()


def test_float16_takes_the_largest_scale_that_does_not_overflow(tmp_path):
    model = fresh_named("llama").to(torch.float16)
    with torch.no_grad():
        model.model.norm.weight.mul_(30)
    streamed, whole = scored(model, tmp_path / "work"), hk.calibrate(model, token_ids(), memory="lean")
    assert (streamed.record["loss_scale"], whole.record["loss_scale"]) == (2.0**12, 2.0**12)
    for group in whole.groups:
        one, other = (s.fine[group.name]["second"] for s in (streamed, whole))
        assert float((one - other).abs().max()) < 0.05 * float(other.abs().max())


def test_hooks_on_layers_are_refused():
    model = fresh_named("llama")
    model.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(hk.HywiaError, match="expected no hooks on decoder layers, got some on layer 1"):
        scored(model)


def test_the_model_is_as_it_was():
    model = fresh_named("llama").train()
    before = {name: (id(p), p.requires_grad, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    for place in ("device", "host"):
        scored(model, weights=place)
        for name, p in model.named_parameters():
            identity, wanted, pointer, values = before[name]
            assert (id(p), p.requires_grad, p.data_ptr()) == (identity, wanted, pointer)
            assert torch.equal(p, values)
            assert p.grad is None
    assert all(module.training for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"orders": ("third",)}, "orders: expected some of first, second, mixed"),
        ({"orders": "second"}, "orders: expected some of first, second, mixed, got 'second'"),
        ({"weights": "disk"}, "weights: expected one of auto, device, host, files, got 'disk'"),
        ({"weights": "files"}, "weights: 'files' goes with a model that open_stored gave"),
    ],
)
def test_what_does_not_go_is_refused(how, words):
    with pytest.raises(hk.UsageError, match=words):
        scored(fresh_named("llama"), **how)
