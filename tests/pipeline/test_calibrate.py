"""Statistics against a plain per-sample loop that knows nothing of the table or the engine."""

from __future__ import annotations

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.engine import autograd, loss
from tests.support.statistics import plain_statistics

ORDERS = ("first", "second", "mixed")


def assert_close(got, want, scale, rel=2e-5):
    assert got.shape == want.shape
    error = float((got.double() - want.double()).abs().max() / scale.double().abs().max().clamp(min=1e-300))
    assert error <= rel, f"relative error {error:.2e} over {rel:.0e}"


def compare(statistics, plain):
    for group in statistics.groups:
        fine, coarse = plain[group.name]
        for order in ORDERS:
            assert_close(statistics.fine[group.name][order], fine[order], fine[order])
        assert_close(statistics.coarse[group.name], coarse, coarse)


def test_equals_a_plain_per_sample_loop(model, tokens, way):
    compare(hk.calibrate(model, tokens, **way), plain_statistics(model, list(tokens)))


def test_ragged_samples_equal_the_plain_loop(gqa, tokens, way):
    samples = [tokens[0], tokens[1, :9], tokens[2, :2], tokens[3, :14]]
    compare(hk.calibrate(gqa, samples, **way), plain_statistics(gqa, samples))


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_layers_run_again_give_the_same_bits(gqa, tokens, engine):
    fast, lean = (hk.calibrate(gqa, tokens, engine=engine, memory=memory) for memory in ("fast", "lean"))
    assert (fast.record["memory"], lean.record["memory"]) == ("fast", "lean")
    for name, coarse in fast.coarse.items():
        assert torch.equal(coarse, lean.coarse[name])
        assert all(torch.equal(fast.fine[name][o], lean.fine[name][o]) for o in ORDERS)


def test_loss_in_chunks_gives_the_same_statistics(gqa, tokens, monkeypatch):
    whole = hk.calibrate(gqa, tokens)
    monkeypatch.setattr(loss, "LOGIT_BYTES", 7 * 4 * gqa.config.vocab_size)
    chunked = hk.calibrate(gqa, tokens)
    for group in whole.groups:
        fine = whole.fine[group.name]["second"]
        assert_close(chunked.fine[group.name]["second"], fine, fine, rel=1e-5)


def test_wrong_kv_stride_is_caught(gqa, tokens):
    """LLM-Pruner's fold credits query heads {k, k + KV, ...} to KV head k; a KV group's heads are consecutive."""
    statistics = hk.calibrate(gqa, tokens)
    plain = plain_statistics(gqa, list(tokens))
    planted = plain_statistics(gqa, list(tokens), wrong_kv_stride=True)
    compare(statistics, plain)
    with pytest.raises(AssertionError, match="relative error"):
        compare(statistics, planted)


def test_up_row_and_down_column_share_the_mask_derivative(gqa, tokens):
    """Both are the derivative with respect to a mask on the channel's activation (SwiGLU is linear in up)."""
    statistics = hk.calibrate(gqa, tokens)
    for group in statistics.groups:
        if group.kind == "mlp":
            _gate, up, down = statistics.coarse[group.name]
            assert_close(up, down, down)


def test_identities_with_activations(gqa, tokens):
    """Σ_w G_s·w over an output row is Σ_t y·dy, over an input column Σ_t x·dx."""
    layer = gqa.model.layers[1]
    kept: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            args[0].retain_grad()
            output.retain_grad()
            kept[name + ".x"], kept[name + ".y"] = args[0], output

        return hook

    handles = [
        layer.mlp.up_proj.register_forward_hook(keep("up")),
        layer.mlp.down_proj.register_forward_hook(keep("down")),
    ]
    logits = gqa(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1).sum()
    loss.backward()
    for handle in handles:
        handle.remove()
    statistics = hk.calibrate(gqa, tokens)
    _gate, up, down = statistics.coarse["model.layers.1.mlp"]
    rows = (kept["up.y"] * kept["up.y"].grad).sum(1)
    columns = (kept["down.x"] * kept["down.x"].grad).sum(1)
    assert_close(up, rows.detach(), rows.detach())
    assert_close(down, columns.detach(), columns.detach())


def test_leaves_the_model_as_it_was(gqa, tokens, way):
    before = {n: p.clone() for n, p in gqa.named_parameters()}
    gqa.train()
    gqa.model.norm.weight.requires_grad_(False)
    gqa.lm_head.weight.grad = torch.ones_like(gqa.lm_head.weight)
    hk.calibrate(gqa, tokens, **way)
    assert gqa.training
    assert [n for n, p in gqa.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert torch.equal(gqa.lm_head.weight.grad, torch.ones_like(gqa.lm_head.weight))
    assert all(p.grad is None for n, p in gqa.named_parameters() if "_proj" in n)
    assert all("forward" not in vars(m) for m in gqa.modules())
    assert all(torch.equal(before[n], p) for n, p in gqa.named_parameters())


def test_no_weight_gradient_outlives_its_turn(gqa, tokens, monkeypatch):
    """One matrix at a time: when a matrix is scored, no parameter holds a gradient."""
    original = autograd.Sink.__call__
    seen = []

    def spy(self, *operands):
        seen.append(sum(p.grad is not None for p in gqa.parameters()))
        return original(self, *operands)

    monkeypatch.setattr(autograd.Sink, "__call__", spy)
    hk.calibrate(gqa, tokens, engine="autograd")
    assert seen == [0] * (7 * gqa.config.num_hidden_layers)


def test_float16_gradients_do_not_underflow(gqa, tokens, way):
    """The head is scaled down until float16 gradients without a loss scale are zero."""
    with torch.no_grad():
        gqa.model.norm.weight.mul_(2.0**-15)
    exact = hk.calibrate(gqa, tokens, **way)
    half = hk.calibrate(gqa.half(), tokens, **way)
    assert half.record["dtype"] == "float16"
    assert half.record["loss_scale"] > 1
    for group in exact.groups:
        want = exact.fine[group.name]["second"]
        assert float(want.min()) > 0
        assert_close(half.fine[group.name]["second"], want, want, rel=0.1)


def test_bfloat16_ranks_like_float32(gqa, tokens):
    exact, low = hk.calibrate(gqa, tokens), hk.calibrate(gqa.bfloat16(), tokens)
    for group in exact.groups:
        want, got = exact.fine[group.name]["first"], low.fine[group.name]["first"]
        assert float(torch.corrcoef(torch.stack([want.log(), got.log()]))[0, 1]) > 0.98


def test_same_bits_every_run(gqa, tokens, way):
    one, two = hk.calibrate(gqa, tokens, **way), hk.calibrate(gqa, tokens, **way)
    assert all(torch.equal(one.coarse[n], two.coarse[n]) for n in one.coarse)
    assert all(torch.equal(one.fine[n][o], two.fine[n][o]) for n in one.fine for o in ORDERS)


def test_record(gqa, tokens):
    record = hk.calibrate(gqa, tokens).record
    assert (record["samples"], record["seq_len"], record["device"], record["dtype"]) == (4, 17, "cpu", "float32")
    assert record["backend"] in ("native", "reference")
    assert record["versions"]["torch"] == torch.__version__
    assert (record["engine"], record["memory"], record["runs"]) == ("fused", "fast", 1)
    assert record["peak_bytes"] is None  # only CUDA counts
    assert record["estimate_bytes"] > 4 * 17 * 3 * 4 * (2 * 48 + 2 * 56)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_named(gqa, tokens, value, way):
    with torch.no_grad():
        gqa.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(
        HywiaError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: expected finite weights, found 1 of"
    ):
        hk.calibrate(gqa, tokens, **way)
    assert all("forward" not in vars(m) for m in gqa.modules())


def test_bad_gradients_are_named(gqa, tokens, way):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    gqa.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: Poison.apply(output))
    with pytest.raises(HywiaError, match=r"model\.layers\.1\.mlp\.up_proj: expected finite gradients"):
        hk.calibrate(gqa, tokens, **way)


def test_token_ids_beyond_the_vocabulary(gqa, tokens):
    tokens[1, 2] = 259
    with pytest.raises(HywiaError, match=r"vocabulary \[0, 259\), got ids from \d+ to 259"):
        hk.calibrate(gqa, tokens)


@pytest.mark.parametrize("bad", [torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 3), [], [torch.zeros(1).long()]])
def test_malformed_batches(gqa, bad):
    with pytest.raises(UsageError, match="^batches: expected"):
        hk.calibrate(gqa, bad)
