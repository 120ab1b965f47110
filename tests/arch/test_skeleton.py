"""A model without weights has the groups, shapes, dtype and ties of the loaded model, and is refused alike."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError, arch
from hywia_kernels.checkpoint.skeleton import skeleton
from tests.support.cuts import make_plan
from tests.support.families import FAMILIES, fresh, fresh_named
from tests.support.structure import check_alike
from tests.support.tokenizers import write_tokenizer


def written(folder, model):
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_family(family, tmp_path):
    folder = written(tmp_path / "model", fresh(family))
    check_alike(skeleton(folder), hk.load(folder, device="cpu")[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("said", [True, False])
def test_the_stored_dtype(dtype, said, tmp_path):
    folder = written(tmp_path / "model", fresh_named("qwen3").to(dtype))
    if not said:
        edit_config(folder, dtype=None)
    bare = skeleton(folder)
    assert {p.dtype for p in bare.parameters()} == {dtype}
    check_alike(bare, hk.load(folder, device="cpu")[0])


def test_a_directory_of_a_config_alone(tmp_path):
    model = fresh_named("llama")
    model.config.save_pretrained(tmp_path)
    assert arch.groups(skeleton(tmp_path)) == arch.groups(model)
    with pytest.raises(HywiaError, match="safetensors"):
        hk.load(tmp_path)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_stored_beside_the_embedding_it_is_said_to_be(equal, tmp_path):
    folder = written(tmp_path / "model", fresh_named("llama"))
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone() + (not equal)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    bare, (model, _) = skeleton(folder), hk.load(folder, device="cpu")
    check_alike(bare, model)
    assert model.config.tie_word_embeddings is equal


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_layers_of_different_widths(name, tmp_path):
    model = fresh_named(name)
    plan = make_plan(model, "adaptive-mlp")
    hk.prune(model, plan)
    hk.save(model, None, tmp_path / "cut", plan=plan)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["model_type"] == "hywia_adaptive"
    write_tokenizer(tmp_path / "cut")
    check_alike(skeleton(tmp_path / "cut"), hk.load(tmp_path / "cut", device="cpu")[0])


def test_of_the_hub_comes_the_description_alone(tmp_path, monkeypatch):
    model = fresh_named("qwen2")
    folder = written(tmp_path / "cache", model)
    (folder / "model.safetensors").unlink()
    asked = []

    def snapshot_download(name, *, allow_patterns, **options):
        asked.append((name, tuple(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    bare = skeleton("someone/model")
    assert arch.groups(bare) == arch.groups(model)
    assert bare.name_or_path == bare.config.name_or_path == "someone/model"
    assert [name for name, _ in asked] == ["someone/model"]
    assert not [pattern for pattern in asked[0][1] if pattern.endswith((".safetensors", ".py", ".bin"))]


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "no_such_type"},
        {"model_type": None},
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 500},
        {"fusion_config": {"a": 1}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"hidden_act": "no such function"},
        {"tie_word_embeddings": "yes"},
    ],
    ids=str,
)
def test_what_load_refuses_is_refused_in_the_same_words(fields, tmp_path):
    folder = written(tmp_path / "model", fresh_named("llama"))
    edit_config(folder, **fields)
    with pytest.raises(HywiaError) as loading:
        hk.load(folder)
    with pytest.raises(HywiaError) as bare:
        skeleton(folder)
    assert str(bare.value) == str(loading.value)


@pytest.mark.parametrize("break_it", ["no config", "no tokenizer", "a pickle", "an adapter", "cut short"])
def test_directories_that_load_refuses(break_it, tmp_path):
    folder = written(tmp_path / "model", fresh_named("llama"))
    weights = folder / "model.safetensors"
    if break_it == "no config":
        (folder / "config.json").unlink()
    elif break_it == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif break_it == "a pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif break_it == "an adapter":
        (folder / "adapter_config.json").write_text("{}")
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(HywiaError) as loading:
        hk.load(folder)
    with pytest.raises(HywiaError) as bare:
        skeleton(folder)
    assert str(bare.value) == str(loading.value)


@pytest.mark.parametrize("name", ["", " ", None, 5])
def test_names_that_are_none(name):
    with pytest.raises(UsageError, match="expected a hub id"):
        skeleton(name)


@pytest.mark.parametrize("name", ["./nothing", "a/b/c", "missing.gguf"])
def test_models_that_are_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HywiaError, match="no such"):
        skeleton(name)
