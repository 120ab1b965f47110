"""Directories that are complete or absent, stock, and recorded."""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.checkpoint import atomic_directory
from tests.support.tiny import TINY, Tiny, fresh, make_plan


@pytest.fixture
def pruned(gqa):
    plan = make_plan(gqa, "both")
    hk.prune(gqa, plan)
    return gqa, plan


def test_directory_is_a_stock_checkpoint_with_a_record(pruned, tokenizer, tmp_path):
    model, plan = pruned
    hk.save(model, tokenizer, tmp_path / "out", plan=plan, record={"arguments": {"ratio": 0.4}})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "mistral"  # servers' Llama code takes hidden / heads for a head's size, here 12
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (32, 4, 2)
    assert config["head_dim"] == 8
    record = json.loads((tmp_path / "out" / "hywia.json").read_text())
    assert record["arguments"] == {"ratio": 0.4}
    assert record["kept_units"]["model.layers.0.mlp"] == plan.keep["model.layers.0.mlp"].tolist()
    assert record["plan"]["parameters_after"] == sum(p.numel() for p in model.parameters())
    assert record["versions"]["torch"] == torch.__version__
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("héllo")["input_ids"] == tokenizer("héllo")["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "hywia.json", "model.safetensors", "tokenizer.json"} <= files
    assert not any(name.endswith((".bin", ".pt", ".py", ".partial")) for name in files)
    modes = {os.stat(tmp_path / "out" / name).st_mode & 0o777 for name in files}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_stand_in_config_describes_the_same_mathematics(tokenizer, tmp_path):
    model = fresh(TINY[1])
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    hk.prune(model, make_plan(model, "one-head"))
    hk.save(model, tokenizer, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.num_attention_heads, config.head_dim) == ("mistral", 5, 8)
    assert config.sliding_window is None
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert (config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (256, 257, False)


def test_a_biased_llama_with_heads_no_config_takes_is_saved_as_adaptive(tokenizer, tmp_path):
    model = Tiny("biased", heads=6, kv_heads=6, tied=False, bias=True).build()
    hk.prune(model, make_plan(model, "one-head"))
    hk.save(model, tokenizer, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "hywia.json").read_text())
    assert "no stand-in describes the model with {'attention_bias': False" in record["not_stock"]
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "hywia_adaptive"


def test_uniform_plans_avoid_counts_no_config_takes():
    model = Tiny("biased", heads=6, kv_heads=6, tied=False, bias=True).build()
    scores = hk.score(model, criterion="random")
    for ratio in (0.05, 0.1, 0.2, 0.3):
        plan = hk.plan(scores, ratio=ratio, align=4)
        assert 48 % plan.widths("attention")[0] == 0


def test_tied_weights_are_stored_once(tokenizer, tmp_path):
    from safetensors import safe_open

    for tiny, stored in ((TINY[2], False), (TINY[1], True)):
        hk.save(fresh(tiny), tokenizer, tmp_path / tiny.name)
        with safe_open(tmp_path / tiny.name / "model.safetensors", "pt") as file:
            assert ("lm_head.weight" in file.keys()) == stored  # noqa: SIM118


def test_existing_directory_needs_overwrite_and_survives_a_failure(pruned, tokenizer, tmp_path, monkeypatch):
    model, _ = pruned
    hk.save(model, tokenizer, tmp_path / "out")
    with pytest.raises(UsageError, match=r"exists; choose another directory, or pass --overwrite"):
        hk.save(model, tokenizer, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full_disk)
    with pytest.raises(HywiaError, match="No space left on device"):
        hk.save(model, tokenizer, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    with torch.no_grad():
        model.model.norm.weight.fill_(0.25)
    hk.save(model, tokenizer, tmp_path / "out", overwrite=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.model.norm.weight, torch.full((48,), 0.25))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_deletes_what_is_no_model(pruned, tokenizer, tmp_path):
    model, _ = pruned
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="holds neither a model nor scores"):
        hk.save(model, tokenizer, tmp_path / "home", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is not a directory"):
        hk.save(model, tokenizer, tmp_path / "file", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_unwritable_parent_is_refused_before_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(HywiaError, match="output: cannot write in"):
        atomic_directory.check_target(tmp_path / "file" / "out", overwrite=False)
