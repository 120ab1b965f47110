"""The cut from files to files gives every family's directory in the bytes that prune and save give."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hywia_kernels as hk
from hywia_kernels.arch.facts import fingerprint
from hywia_kernels.checkpoint.cut_directory import CutDirectory
from hywia_kernels.checkpoint.stored_model import open_stored
from tests.support.cuts import layer_plan, make_plan
from tests.support.derived import small
from tests.support.directories import assert_equal_directories, contents
from tests.support.families import FAMILIES, fresh
from tests.support.tokenizers import write_tokenizer

SHARD = 30_000  # bytes: the tiny models are in several files


@pytest.fixture(autouse=True)
def no_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def written(model, folder):
    model.save_pretrained(folder, max_shard_size=SHARD)
    write_tokenizer(folder)
    return folder


def assert_same_cut(source, cut, tmp_path, **options):
    """Both ways, into directories of one name, which the model card says."""
    model, tokenizer = hk.load(source, **options)
    plan = layer_plan(model, [0, 2], units=("mlp",)) if cut == "layers" else make_plan(model, cut)
    record = {"arguments": {"cut": cut}}
    hk.prune_files(source, plan, tmp_path / f"files-{cut}" / "out", record=record, **options)
    hk.prune(model, plan)
    hk.save(model, tokenizer, tmp_path / f"memory-{cut}" / "out", plan=plan, record=record)
    assert_equal_directories(tmp_path / f"files-{cut}" / "out", tmp_path / f"memory-{cut}" / "out")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_files_to_files_is_prune_and_save(family, tmp_path):
    source = written(fresh(family), tmp_path / "in")
    cuts = ["both", "adaptive", *(["experts", "all"] if family.experts else [])]
    if not family.name.startswith("gemma4"):  # whose layers stay: what they compute depends on their places
        cuts.append("layers")
    for cut in cuts:
        assert_same_cut(source, cut, tmp_path)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_stored_model_is_the_loaded_one(family, tmp_path):
    """Values, buffers that are stored and those that are made, and the fingerprint over all of them."""
    source = written(fresh(family), tmp_path / "in")
    model, _ = hk.load(source)
    stored = open_stored(source)
    values = {name: value for bundle in stored.bundles for name, value in stored.read(bundle).items()}
    assert values.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(values[name], p) for name, p in model.named_parameters())
    assert all(p.is_meta for p in stored.model.parameters())
    buffers = dict(stored.model.named_buffers())
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())
    assert stored.whole_fingerprint() == fingerprint(model)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_cut_model_is_cut_again(name, tmp_path):
    """Its layers differ, and its class is this package's own."""
    model = fresh(next(f for f in FAMILIES if f.name == name))
    hk.prune(model, make_plan(model, "adaptive"))
    hk.save(model, None, tmp_path / "once")
    write_tokenizer(tmp_path / "once")
    for cut in ("mlp", "adaptive"):
        assert_same_cut(tmp_path / "once", cut, tmp_path)


def test_another_dtype(tmp_path):
    source = written(fresh(FAMILIES[0]), tmp_path / "in")
    assert_same_cut(source, "both", tmp_path, dtype="bfloat16")


def test_a_head_that_is_stored_twice(tmp_path):
    """The checkpoint holds the embedding under both names, though the config says that they are one."""
    model = fresh(FAMILIES[0])
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    state = load_file(tmp_path / "in" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    assert_same_cut(tmp_path / "in", "mlp", tmp_path)
    state["lm_head.weight"] += 1.0  # a head of its own, whatever the config says
    save_file(state, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    assert_same_cut(tmp_path / "in", "attention", tmp_path)


def assert_same_refit(source, cut, tmp_path, passes=0):
    """All but the seconds that it took, the same bits."""
    text = torch.randint(2, 131, (40, 14), generator=torch.Generator().manual_seed(5))
    model, tokenizer = hk.load(source)
    plan = layer_plan(model, [0, 3], units=("mlp", "attention")) if cut == "layers" else make_plan(model, cut)
    after = hk.prune_files(source, plan, tmp_path / f"files-{cut}" / "out", refit=text, ridge=1e-2, passes=passes)
    want = hk.reconstruct(model, plan, text, ridge=1e-2, passes=passes)
    hk.prune(model, want)
    hk.save(model, tokenizer, tmp_path / f"memory-{cut}" / "out", plan=want)
    mine, theirs = (contents(tmp_path / f"{way}-{cut}" / "out") for way in ("files", "memory"))
    assert mine.keys() == theirs.keys()
    assert [n for n in mine if mine[n] != theirs[n] and n not in ("hywia.json", "README.md")] == []
    assert after.fingerprint == want.fingerprint
    assert {**after.record["refit"], "seconds": 0} == {**want.record["refit"], "seconds": 0}
    assert after.record["refit"]["relative_error"] or cut == "experts"
    return after


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_refit_from_files_is_the_one_in_memory(family, tmp_path):
    source = written(fresh(family), tmp_path / "in")
    for cut in ("both", "adaptive", *(["experts", "all"] if family.experts else [])):
        assert_same_refit(source, cut, tmp_path)


def test_layers_trained_from_files_are_those_in_memory(tmp_path):
    for name in ("llama", "opt"):
        source = written(fresh(next(f for f in FAMILIES if f.name == name)), tmp_path / name / "in")
        after = assert_same_refit(source, "both", tmp_path / name, passes=2)
        assert any(new < old for old, new in after.record["refit"]["layer_error"].values())


@pytest.mark.parametrize("keep", [[0, 3], [1, 2], [0, 1]])
def test_layers_before_a_gap_are_refitted_from_files(keep, tmp_path):
    """Layers go in the middle, at the beginning and at the end, on ragged text."""
    llama = next(f for f in FAMILIES if f.name == "llama-bias")
    model = dataclasses.replace(llama, config=llama.config | {"num_hidden_layers": 4}).build()
    source = written(model, tmp_path / "in")
    text = [torch.randint(2, 131, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 14, 3, 14, 11)]
    plan = layer_plan(model, keep, units=("mlp",))
    after = hk.prune_files(source, plan, tmp_path / "files", refit=text)
    want = hk.reconstruct(model, plan, text)
    hk.prune(model, want)
    cut, _ = hk.load(tmp_path / "files")
    assert after.fingerprint == want.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), model.parameters(), strict=True))
    assert len(cut.model.layers) == 2


@pytest.mark.parametrize("name", ["cohere", "deepseek_v3"])
def test_a_derived_family_is_cut_from_its_files(name, tmp_path):
    """Its structure proves itself on a small copy; with experts that are stored one by one, and beside them shared."""
    small(name).save_pretrained(tmp_path / "in", max_shard_size=100_000)
    write_tokenizer(tmp_path / "in")
    model, tokenizer = hk.load(tmp_path / "in")
    hk.prove(model)
    plan = hk.plan(hk.score(model, criterion="random", seed=5), group_ratio=0.4, units=("mlp", "attention"))
    hk.prune_files(tmp_path / "in", plan, tmp_path / "files" / "out")
    hk.prune(model, plan)
    hk.save(model, tokenizer, tmp_path / "memory" / "out", plan=plan)
    assert_equal_directories(tmp_path / "files" / "out", tmp_path / "memory" / "out")


def test_parameters_that_files_hold_together_are_written_together(tmp_path, monkeypatch):
    """Files that take gate and up in one piece, as some families' do, though they are read one by one."""
    right = CutDirectory._converted

    def joined(self, state):
        made = right(self, state)
        for name in [n for n in made if n.endswith("gate_proj.weight")]:
            up = name.replace("gate_proj", "up_proj")
            gate = made.pop(name)
            if up in made:
                made[name.replace("gate_proj", "gate_up_proj")] = torch.cat([gate, made.pop(up)])
        return {n: v for n, v in made.items() if not n.endswith("up_proj.weight") or "gate_up" in n}

    monkeypatch.setattr(CutDirectory, "_converted", joined)
    source = written(fresh(next(f for f in FAMILIES if f.name == "llama-bias")), tmp_path / "in")
    model, _ = hk.load(source)
    plan = make_plan(model, "mlp")
    hk.prune_files(source, plan, tmp_path / "out")
    hk.prune(model, plan)
    stored = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        stored |= load_file(file)
    mlp = model.model.layers[2].mlp
    want = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    assert torch.equal(stored["model.layers.2.mlp.gate_up_proj.weight"], want)
    assert torch.equal(stored["model.layers.2.mlp.up_proj.bias"], mlp.up_proj.bias)
