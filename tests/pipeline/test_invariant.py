"""The pruned, saved, reloaded model gives the logits of the original with the removed units masked to zero."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.method import compaction, surgery
from tests.support.comparison import logits, relative
from tests.support.cuts import masked_logits
from tests.support.processes import run_jobs
from tests.support.tiny import PLANS, TINY, fresh, make_plan

RELATIVE = 1e-5


@pytest.mark.parametrize("name", PLANS)
def test_pruned_equals_masked(model, tokens, name):
    plan = make_plan(model, name)
    want = masked_logits(model, plan, tokens)
    assert relative(want, logits(model, tokens)) > 1e-2, "the mask must matter for the comparison to mean anything"
    hk.prune(model, plan)
    assert relative(logits(model, tokens), want) <= RELATIVE


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_every_compact_backend_cuts_the_same(gqa, tokens, backend):
    state = {a.name: a for a in hk.ops.availability()}[backend]
    if not state.on:
        pytest.skip(state.reason)
    plan = make_plan(gqa, "both")
    want = masked_logits(gqa, plan, tokens)
    hk.prune(gqa, plan, backend=backend)
    assert relative(logits(gqa, tokens), want) <= RELATIVE


def test_saved_and_reloaded_in_a_fresh_process(tmp_path, tokenizer, tokens):
    """One process for all cases: it loads with stock transformers and has never heard of this package."""
    jobs, wanted = [], []
    for tiny in TINY:
        for name in ("mlp", "attention", "both", "one-head")[: 4 if tiny.name.startswith("mha") else 3]:
            model = fresh(tiny)
            plan = make_plan(model, name)
            masked = masked_logits(model, plan, tokens)
            hk.prune(model, plan)
            folder = tmp_path / f"{tiny.name}-{name}"
            hk.save(model, tokenizer, folder, plan=plan)
            ids = model.generate(
                tokens[:1], attention_mask=torch.ones_like(tokens[:1]), do_sample=False, max_new_tokens=8
            )
            jobs.append({"folder": str(folder), "tokens": tokens.tolist(), "out": str(folder) + ".pt"})
            wanted.append((masked, logits(model, tokens), ids[0].tolist()))
    results = run_jobs(Path(__file__).with_name("reload.py"), jobs, tmp_path)
    classes = set()
    for job, (masked, memory, ids), result in zip(jobs, wanted, results, strict=True):
        reloaded = torch.load(job["out"], weights_only=True)
        assert relative(reloaded, masked) <= RELATIVE, job["folder"]
        assert torch.equal(reloaded, memory), job["folder"]
        assert result["ids"] == ids, job["folder"]
        classes.add(result["class"])
    assert classes == {"LlamaForCausalLM", "MistralForCausalLM"}  # 48 has no 5 heads: the stand-in takes those


def test_adaptive_checkpoints_reload_through_this_package(model, tokenizer, tokens, tmp_path):
    plan = make_plan(model, "adaptive")
    masked = masked_logits(model, plan, tokens)
    hk.prune(model, plan)
    hk.save(model, tokenizer, tmp_path / "out", plan=plan)
    again, _ = hk.load(tmp_path / "out")
    assert relative(logits(again, tokens), masked) <= RELATIVE
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("name", ["both", "one-head"])
def test_a_pruned_model_can_be_pruned_again(tokenizer, tokens, tmp_path, name):
    """Also when it was saved as its stand-in (five heads)."""
    model = fresh(TINY[1])
    hk.prune(model, make_plan(model, name))
    hk.save(model, tokenizer, tmp_path / "once")
    again, _ = hk.load(tmp_path / "once")
    assert again.config.model_type == "mistral"  # servers guess the size of a Llama's heads
    plan = hk.plan(hk.score(again, tokens), ratio=0.1, align=4, units=("mlp",))
    want = masked_logits(again, plan, tokens)
    hk.prune(again, plan)
    assert relative(logits(again, tokens), want) <= RELATIVE


def test_wrong_kv_stride_is_caught(gqa, tokens, monkeypatch):
    """Cut query heads {k, k + KV, ...} with KV head k, as other tools do, and the invariant breaks."""
    plan = make_plan(gqa, "attention")
    want = masked_logits(gqa, plan, tokens)
    right = compaction.unit_entries

    def planted(units, group_size):
        if group_size != 16:  # q rows and o columns: two heads of 8
            return right(units, group_size)
        heads = torch.cat([units, units + 3]).sort().values
        return right(heads, 8)

    monkeypatch.setattr(compaction, "unit_entries", planted)
    hk.prune(gqa, plan)
    assert relative(logits(gqa, tokens), want) > 1e-2


def test_bfloat16_is_cut_exactly_and_keeps_its_dtype(gqa, tokenizer, tokens, tmp_path):
    gqa.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    gqa, _ = hk.load(tmp_path / "in", dtype="bfloat16")
    plan = make_plan(gqa, "both")
    want = masked_logits(gqa, plan, tokens)
    hk.prune(gqa, plan)
    assert relative(logits(gqa, tokens).float(), want.float()) <= 2e-2
    hk.save(gqa, tokenizer, tmp_path / "out")
    again, _ = hk.load(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again, tokens), logits(gqa, tokens))


def test_plan_of_another_model_is_refused_and_nothing_is_touched(gqa):
    plan = make_plan(gqa, "both")
    with torch.no_grad():
        gqa.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    before = {n: p.shape for n, p in gqa.named_parameters()}
    with pytest.raises(HywiaError, match="scores of another model"):
        hk.prune(gqa, plan)
    assert before == {n: p.shape for n, p in gqa.named_parameters()}


def test_pruning_twice_with_one_plan_is_refused(gqa):
    plan = make_plan(gqa, "both")
    hk.prune(gqa, plan)
    with pytest.raises(HywiaError, match="pruned already"):
        hk.prune(gqa, plan)


def test_only_one_extra_matrix_at_a_time(gqa, monkeypatch):
    """Each old weight is released before the next matrix is cut."""
    import weakref

    plan = make_plan(gqa, "both")
    dead: list[weakref.ref] = []
    alive_at_cut = []
    original = hk.ops.compact

    def spy(weight, keep, axis=0, **options):
        alive_at_cut.append(sum(r() is not None for r in dead))
        return original(weight, keep, axis, **options)

    for group in plan.groups:
        for member in group.members:
            dead.append(weakref.ref(gqa.get_submodule(member.module).weight))
    monkeypatch.setattr(hk.ops, "compact", spy)
    hk.prune(gqa, plan)
    total = len(dead)
    assert alive_at_cut == [total - i for i in range(total)]


@pytest.mark.parametrize("name", ["both", "adaptive"])
def test_resize_gives_the_shapes_of_a_cut(model, name):
    plan = make_plan(model, name)
    empty = copy.deepcopy(model)
    surgery.resize(empty, {n: keep.numel() for n, keep in plan.keep.items()})
    hk.prune(model, plan)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert [g.units for g in hk.groups(empty)] == [g.units for g in hk.groups(model)]


@pytest.mark.parametrize(
    ("counts", "message"), [({"x": 1}, "got 'x'"), ({"model.layers.0.mlp": 0}, "at least one channel")]
)
def test_resize_refuses_what_is_no_width(gqa, counts, message):
    with pytest.raises(HywiaError, match=message):
        surgery.resize(gqa, counts)
