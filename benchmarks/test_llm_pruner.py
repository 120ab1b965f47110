"""LLM-Pruner's flow against its formula written out, and against the statistics of `calibrate`."""

from __future__ import annotations

import pytest
import torch

import hywia_kernels as hk

from . import llm_pruner, models

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.build("tiny", None, "float32", CPU)


@pytest.fixture
def tokens(model):
    return models.token_ids(model, 3, 9, CPU)


def gradients(model, samples):
    """Per-sample gradients of every weight, float64, by autograd over logits."""
    gradients = []
    for sample in samples:
        logits = model(sample[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, sample[1:])
        names, weights = zip(*model.named_parameters(), strict=True)
        gradients.append(dict(zip(names, (g.double() for g in torch.autograd.grad(loss, weights)), strict=True)))
    return gradients


def test_scores_equal_the_formula(model, tokens):
    by_sample = gradients(model, tokens)
    terms = {
        "param_first": lambda w, g, f: w * g,
        "param_second": lambda w, g, f: w * f * w,
        "param_mix": lambda w, g, f: w * g - 0.5 * w * f * w,
    }
    for taylor, term in terms.items():
        scores = llm_pruner.score(model, tokens, taylor)
        for layer in range(2):
            sums = {}
            for kind, names in {"mlp": ("gate", "up", "down"), "self_attn": ("q", "k", "v", "o")}.items():
                for short in names:
                    name = f"model.layers.{layer}.{kind}.{short}_proj.weight"
                    stack = torch.stack([g[name] for g in by_sample])
                    weight = model.get_parameter(name).detach().double()
                    absolute = term(weight, stack.mean(0), stack.square().mean(0)).abs()
                    sums[short] = absolute.sum(0) if short in ("down", "o") else absolute.sum(1)
            channels = sums["gate"] + sums["up"] + sums["down"]
            torch.testing.assert_close(scores[f"model.layers.{layer}.mlp"].double(), channels, rtol=1e-4, atol=0)
            # Four heads of 16, two KV heads: head pairs {0, 1} and {2, 3}.
            heads = sums["q"].view(2, 32).sum(1) + sums["o"].view(2, 32).sum(1)
            heads = heads + sums["k"].view(2, 16).sum(1) + sums["v"].view(2, 16).sum(1)
            torch.testing.assert_close(scores[f"model.layers.{layer}.attention"].double(), heads, rtol=1e-4, atol=0)


def test_param_mix_equals_the_mixed_fine_statistics(model, tokens):
    """The same quantity by two roads: equally long samples, so the batch's loss is the mean of the samples'."""
    statistics = hk.calibrate(model, tokens)
    for taylor, order in (("param_first", "first"), ("param_second", "second"), ("param_mix", "mixed")):
        factor = 2 if order == "second" else 1  # `w·F·w`, not half of it
        for name, score in llm_pruner.score(model, tokens, taylor).items():
            torch.testing.assert_close(score, factor * statistics.fine[name][order], rtol=1e-4, atol=0)


def test_squares_of_every_parameter(model, tokens):
    by_sample = gradients(model, tokens)
    squares = llm_pruner.accumulate_squares(model, tokens)
    assert len(squares) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        want = torch.stack([g[name] for g in by_sample]).square().mean(0)
        torch.testing.assert_close(squares[parameter].double(), want, rtol=1e-3, atol=float(want.max()) * 1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_unknown_taylor(model, tokens):
    with pytest.raises(ValueError, match="taylor: expected one of param_first"):
        llm_pruner.score(model, tokens, "vectorize")
