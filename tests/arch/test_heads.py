"""A head of its own under a config that says tied, in families whose configs say it in different places."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hywia_kernels as hk
from tests.support.families import fresh_named, token_ids


def _logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["stock", "adaptive"])
@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe", "gpt2", "phi3", "bloom", "opt"])
@pytest.mark.parametrize("own", [False, True])
def test_heads_of_every_kind_of_config(tmp_path, name, own, layers):
    model = fresh_named(name)
    if own:
        head = model.get_output_embeddings()
        noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(5))
        head.weight = torch.nn.Parameter(noise * 0.1)
    scores = hk.score(model, criterion="random", seed=5)
    hk.prune(model, hk.plan(scores, group_ratio=0.4, units=("mlp",), align=4, layers=layers))
    hk.save(model, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(_logits(again), _logits(model))
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["tie_word_embeddings"] is False or not own
    if own and "text_config" in values:
        assert values["text_config"]["tie_word_embeddings"] is False
