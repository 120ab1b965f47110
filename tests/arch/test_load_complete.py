"""Loading is whole or refused, in every family: what a checkpoint lacks or holds too much of is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_contract import logits

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint.ties import own_head
from hywia_kernels.checkpoint.weight_files import stored_tensors
from tests.support.families import FAMILIES, fresh, fresh_named, randomised, token_ids
from tests.support.models import random_model, sizes
from tests.support.tokenizers import write_tokenizer


@pytest.fixture(params=FAMILIES, ids=lambda f: f.name)
def stored(request, tmp_path):
    """`(directory, its model)` of every family."""
    model = fresh(request.param)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder, model


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    save_file(change(state) or state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_every_family_is_whole_and_changes_are_named(stored):
    folder, model = stored
    again, _ = hk.load(folder)
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))
    assert own_head(again) == own_head(model)
    layered = [name for name in stored_tensors(folder) if ".1." in name and "experts" not in name]
    last = next(name for name in layered if name.endswith("weight"))
    edit(folder, lambda state: {k: v for k, v in state.items() if k != last})
    with pytest.raises(HywiaError, match="lacks"):
        hk.load(folder)
    edit(folder, lambda state: {**state, last: torch.zeros(3, 5), "model.extra.weight": torch.zeros(2)})
    with pytest.raises(HywiaError) as refused:
        hk.load(folder)
    assert "model.extra.weight" in str(refused.value)
    assert "other shapes" in str(refused.value) or "(3, 5)" in str(refused.value)


@pytest.fixture
def llama(tmp_path):
    shape = sizes(vocabulary=131, hidden=36, intermediate=44, layers=3, heads=6, kv_heads=3)
    folder = tmp_path / "llama"
    model = randomised(random_model(seed=4, **shape, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder, model


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_one_by_one(name, tmp_path):
    fresh_named(name).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    one = next(key for key in kept if ".2." in key and ".experts.3." in key)
    edit(tmp_path, lambda state: {k: v for k, v in state.items() if k != one})
    with pytest.raises(HywiaError, match=rf"lacks \['{one}'\]"):
        hk.load(tmp_path)
    edit(tmp_path, lambda state: {**kept, one: torch.zeros(3, 5)})
    with pytest.raises(HywiaError, match=rf"other shapes than its config says \['{one} is \(3, 5\)"):
        hk.load(tmp_path)
    more = one.replace(".experts.3.", ".experts.5.")
    edit(tmp_path, lambda state: {**kept, more: kept[one].clone()})
    with pytest.raises(HywiaError, match=rf"has unknown \['{more}'\]"):
        hk.load(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_names_of_a_wrapped_model(llama, prefix):
    folder, _ = llama
    edit(folder, lambda state: {prefix + k: v for k, v in state.items()})
    with pytest.raises(HywiaError, match=f"lacks .*has unknown .*the names begin with '{prefix}'"):
        hk.load(folder)


def test_a_base_model_lacks_its_head_unless_it_is_the_embedding(llama, tmp_path):
    folder, model = llama
    model.model.save_pretrained(folder)
    with pytest.raises(HywiaError, match=r"lacks \['lm_head\.weight'\]; it was saved without its head"):
        hk.load(folder)
    edit_config(folder, tie_word_embeddings=True)
    again, _ = hk.load(folder)
    assert torch.equal(again.lm_head.weight, model.model.embed_tokens.weight)
    assert not own_head(again)


def test_a_classifier_is_refused_also_where_no_head_is_missing(llama):
    from transformers import LlamaForSequenceClassification

    folder, model = llama
    classifier = LlamaForSequenceClassification(model.config)
    classifier.save_pretrained(folder)
    with pytest.raises(
        HywiaError, match=r"lacks \['lm_head\.weight'\]; has unknown \['score\.weight'\]; it is no causal"
    ):
        hk.load(folder)
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(HywiaError, match=r"has unknown \['score\.weight'\]"):
        hk.load(folder)


def test_buffers_of_old_checkpoints_are_passed_over(llama):
    folder, model = llama
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(3)}
    edit(folder, lambda state: {**state, **more})
    again, _ = hk.load(folder)
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))


def test_more_layers_than_the_config_says(llama):
    folder, _ = llama
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(HywiaError, match=r"has unknown \['model\.layers\.2\."):
        hk.load(folder)
    edit_config(folder, num_hidden_layers=4)
    with pytest.raises(HywiaError, match=r"lacks \['model\.layers\.3\."):
        hk.load(folder)
    edit_config(folder, num_hidden_layers=9000)
    with pytest.raises(HywiaError, match="holds 30 tensors, but its config.json says 9000 layers"):
        hk.load(folder)


def test_a_head_of_its_own_is_kept_and_the_config_says_so(llama, tmp_path):
    folder, model = llama
    edit_config(folder, tie_word_embeddings=True)
    want = logits(model, token_ids())
    again, tokenizer = hk.load(folder)
    assert own_head(again)
    assert again.config.tie_word_embeddings is False
    assert torch.equal(logits(again, token_ids()), want)
    again.tie_weights()  # what copies and savers do
    assert torch.equal(logits(again, token_ids()), want)
    hk.save(again, tokenizer, tmp_path / "out")
    assert torch.equal(logits(hk.load(tmp_path / "out")[0], token_ids()), want)
    edit(folder, lambda state: {k: v for k, v in state.items() if k != "lm_head.weight"})
    tied, _ = hk.load(folder)
    assert not own_head(tied)
    assert tied.config.tie_word_embeddings is True


def test_weights_of_whole_numbers_are_refused_before_they_are_read(llama):
    folder, _ = llama
    edit(folder, lambda state: {k: v.to(torch.int8) if k.endswith("q_proj.weight") else v for k, v in state.items()})
    with pytest.raises(HywiaError, match=r"q_proj\.weight as I8: it is quantised"):
        hk.load(folder)
