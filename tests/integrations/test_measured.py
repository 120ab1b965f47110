"""What one pass leaves of other architectures: fused projections by channel, what is no linear layer not at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, Phi3Config

import hywia_kernels as hk
from hywia_kernels.integrations.measured import accumulate_fisher, any_measured, clear_fisher, measured

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "phi3": lambda: Phi3Config(**SMALL, max_position_embeddings=64),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    clear_fisher()
    yield
    clear_fisher()


def built(name):
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    return model, torch.randint(64, (3, 9))


def plain(model, ids):
    """Mean and mean square of every parameter's per-sample gradients."""
    mean, square = {}, {}
    for sample in ids:
        model.zero_grad()
        model(sample[None], labels=sample[None], use_cache=False).loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                mean[name] = mean.get(name, 0) + p.grad / len(ids)
                square[name] = square.get(name, 0) + p.grad**2 / len(ids)
    model.zero_grad()
    return mean, square


@pytest.mark.parametrize("axes", ["units", "both"])
def test_projections_that_hold_several_matrices(axes):
    model, ids = built("phi3")
    mean, square = plain(model, ids)
    accumulate_fisher(model, ids, axes=axes)
    seen = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        w, g, f = module.weight.detach(), mean[f"{name}.weight"], square[f"{name}.weight"]
        fused = name.endswith(("qkv_proj", "gate_up_proj"))
        sides = {"out": 1} if fused else ({"out": 1, "in": 0} if axes == "both" else {"in": 0})
        for side, dim in sides.items():
            found = measured(module, side)
            want = {"first": (w * g).abs().sum(dim), "second": 0.5 * (f * w * w).sum(dim)}
            for order, values in want.items():
                assert (found.fine[order] - values).abs().max() <= 1e-5 * values.abs().max()
            assert found.samples.shape == (3, w.shape[1 - dim])
            seen += 1
        if fused and axes == "both":
            assert measured(module, "in") is None
    assert seen == 2 * (4 if axes == "units" else 6)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_what_is_no_linear_layer_is_left_out(name):
    model, ids = built(name)
    accumulate_fisher(model, ids)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and measured(m, "out") is not None]
    if name == "gpt2":
        assert linear == []
        assert not any_measured()
    else:
        assert linear == [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkvo"]


@pytest.mark.parametrize("name", ["phi3", "gpt2", "mixtral"])
def test_hywia_scorer_on_weights_that_hold_several_matrices(name):
    model, ids = built(name)
    scores, own = hk.HyWIAScorer(ids)(model), hk.score(model, ids, fusion="attention")
    for (module, axis), values in scores.items():
        assert model.get_submodule(module).weight.shape[axis] % len(values) == 0
        assert bool(torch.isfinite(values).all())
    if name == "phi3":
        mlp = own.values["model.layers.0.mlp"]
        assert torch.equal(scores["model.layers.0.mlp.gate_up_proj", 0], torch.cat([mlp, mlp]))
        assert torch.equal(scores["model.layers.0.mlp.down_proj", 1], mlp)
        heads = own.values["model.layers.0.attention"]  # two KV groups of two query heads of eight
        parts = [heads.repeat_interleave(n) for n in (16, 8, 8)]
        assert torch.equal(scores["model.layers.0.self_attn.qkv_proj", 0], torch.cat(parts))
    if name == "gpt2":  # stored [in, out]
        assert torch.equal(scores["transformer.h.0.mlp.c_fc", 1], own.values["transformer.h.0.mlp"])
