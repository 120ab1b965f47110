"""Perplexity, size and speed."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError, evaluation
from hywia_kernels.evaluation import blocks, continuation, speeds, stored_bytes, tokens_per_second


def test_perplexity_is_the_exponential_of_the_mean_loss(gqa, tokens):
    losses = []
    for row in tokens:
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(gqa(row[None]).logits[0, :-1], row[1:], reduction="none"))
    want = math.exp(float(torch.cat(losses).double().mean()))
    assert hk.perplexity(gqa, tokens, batch=3) == pytest.approx(want, rel=1e-5)


def test_blocks_cover_the_text_and_drop_the_rest(tokenizer):
    got = blocks(tokenizer, "abcdefghij" * 10, block=32)
    assert got.shape == (3, 32)
    assert got.flatten().tolist() == tokenizer("abcdefghij" * 10)["input_ids"][:96]
    assert blocks(tokenizer, "abcdefghij" * 10, block=32, max_blocks=2).shape == (2, 32)
    with pytest.raises(HywiaError, match="at least one block of 128 tokens, got 100"):
        blocks(tokenizer, "abcdefghij" * 10)
    with pytest.raises(UsageError, match="block: expected at least 2"):
        blocks(tokenizer, "abc", block=1)


def test_evaluate_reports_its_keys(saved):
    model, tokenizer = hk.load(saved)
    found = hk.evaluate(model, tokenizer, "the quick brown fox " * 40, block=64, source=saved)
    assert sorted(found) == ["bytes", "parameters", "perplexity", "text", "tokens_per_second"]
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["bytes"] == (saved / "model.safetensors").stat().st_size == stored_bytes(saved)
    assert found["perplexity"] > 1
    assert found["tokens_per_second"] > 0
    unsaved = hk.evaluate(model, tokenizer, "the quick brown fox " * 40, block=64)
    assert unsaved["bytes"] == 4 * found["parameters"]


def test_nan_is_said(gqa, tokens):
    with torch.no_grad():
        gqa.model.norm.weight.fill_(float("nan"))
    with pytest.raises(HywiaError, match="its loss is NaN"):
        hk.perplexity(gqa, tokens)


def test_generation_helpers(gqa, tokenizer):
    assert tokens_per_second(gqa, new=4, repeats=1) > 0
    one, two = continuation(gqa, tokenizer, "hello", new=6), continuation(gqa, tokenizer, "hello", new=6)
    assert one == two
    assert not one.startswith("hello")


def test_speeds_are_measured_in_turns(gqa, monkeypatch):
    """A machine that slows down evenly hits both alike: the ratio stays near one."""
    other, clock, order = copy.deepcopy(gqa), [0.0], []

    def greedy(model, ids, new):
        order.append("a" if model is gqa else "b")
        clock[0] += 1.0 + len(order)
        return torch.zeros(1, ids.shape[1] + new, dtype=torch.int64)

    monkeypatch.setattr(evaluation, "greedy", greedy)
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: clock[0])
    a, b = speeds([gqa, other], new=4)
    assert "".join(order) == "baabbaab"
    assert a / b == pytest.approx(1.0, abs=0.25)
