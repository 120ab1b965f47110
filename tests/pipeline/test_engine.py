"""The fused passes against the reference pass, what they keep, how they choose, and what they leave behind."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError, arch, ops
from hywia_kernels.engine import block, memory, recompute, whole
from hywia_kernels.engine.instrument import instrument
from hywia_kernels.engine.linear import Scorer
from hywia_kernels.engine.loss import hidden_gradient, targets
from hywia_kernels.engine.patches import forward_replaced, frozen, reproducible
from hywia_kernels.engine.results import Results
from hywia_kernels.engine.samples import padded
from hywia_kernels.method import statistics
from hywia_kernels.progress import Bar
from tests.support.models import random_model, sizes
from tests.support.statistics import plain_statistics
from tests.support.tiny import TINY, fresh

ORDERS = ("first", "second", "mixed")
MODES = ("fast", "lean", "layerwise")


def worst(one, two):
    """Largest relative difference of any vector of two statistics: the norm of the difference over the norm."""
    found = 0.0
    for group in one.groups:
        pairs = [(one.fine[group.name][o], two.fine[group.name][o]) for o in ORDERS]
        pairs += zip(one.coarse[group.name], two.coarse[group.name], strict=True)
        for a, b in pairs:
            assert a.shape == b.shape
            found = max(found, float((a - b).norm() / b.norm()))
    return found


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_reference_pass(gqa, tokens, dtype, allowed, mode, monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_TOKENS", 40)
    model = gqa.to(dtype)
    fused = hk.calibrate(model, tokens, engine="fused", memory=mode)
    plain = hk.calibrate(model, tokens, engine="autograd")
    assert worst(fused, plain) <= allowed
    assert (fused.record["memory"], fused.record["runs"]) == (mode, 2 if mode == "layerwise" else 1)
    assert fused.record["loss"] == pytest.approx(plain.record["loss"], rel=1e-6)
    for name, fine in fused.fine.items():
        got, want = fine["second"], plain.fine[name]["second"]
        for share in (0.2, 0.5):
            count = round(share * len(want))
            border = want.sort().values[count]
            differ = set(got.argsort()[:count].tolist()) ^ set(want.argsort()[:count].tolist())
            assert all(abs(float(want[u] - border)) <= allowed * float(want.max()) for u in differ)


def test_mistral_with_a_sliding_window_shorter_than_the_samples(tokens):
    shape = sizes(vocabulary=259, hidden=48, intermediate=56, layers=2, heads=6, kv_heads=3)
    model = random_model("mistral", seed=3, **shape, head_dim=8, sliding_window=5, initializer_range=0.15)
    want = plain_statistics(model, list(tokens))
    for mode in MODES:
        got = hk.calibrate(model, tokens, memory=mode)
        for name, (fine, coarse) in want.items():
            for order in ORDERS:
                error = (got.fine[name][order].double() - fine[order]).abs().max() / fine[order].abs().max()
                assert float(error) <= 2e-5
            assert float((got.coarse[name].double() - coarse).abs().max() / coarse.abs().max()) <= 2e-5


def test_layerwise_gives_each_sample_its_own_row(gqa, tokens, monkeypatch):
    """Runs are sorted by length; rows must come back in the order of the samples that were passed."""
    monkeypatch.setattr(memory, "CHUNK_TOKENS", 20)
    samples = [tokens[0], tokens[1, :9], tokens[2, :2], tokens[3, :9]]
    whole = hk.calibrate(gqa, samples, memory="fast")
    runs = hk.calibrate(gqa, samples, memory="layerwise")
    assert runs.record["runs"] == 3
    assert worst(runs, whole) <= 1e-5


def test_layerwise_scores_each_matrix_once(gqa, tokens, monkeypatch):
    """|mean of G| and mean of G² do not add over runs, so all tokens of a matrix must arrive in one call."""
    monkeypatch.setattr(memory, "CHUNK_TOKENS", 17)
    calls = []
    original = Scorer.score

    def spy(self, target, grad_output, inputs):
        calls.append((grad_output.shape[0], inputs.shape[0]))
        original(self, target, grad_output, inputs)

    monkeypatch.setattr(Scorer, "score", spy)
    hk.calibrate(gqa, tokens, memory="layerwise")
    assert calls == [(4 * 17, 4 * 17)] * (7 * 3)


def test_padding_is_not_scored(gqa, tokens, monkeypatch):
    seen = []
    original = Scorer.score

    def spy(self, target, grad_output, inputs, mapped=None):
        assert mapped is None or mapped.shape[0] == grad_output.shape[0]
        seen.append((grad_output.shape[0], self.offsets))
        original(self, target, grad_output, inputs, mapped)

    monkeypatch.setattr(Scorer, "score", spy)
    hk.calibrate(gqa, [tokens[0], tokens[1, :14]], memory="fast")
    assert seen == [(31, [0, 17, 31])] * (7 * 3)


@pytest.mark.parametrize("tiny", [TINY[0], TINY[2], TINY[3]], ids=lambda t: t.name)
def test_fast_keeps_what_it_says(tiny, tokens):
    """Bytes saved for backward: per layer what enters the two norms, q, k, v, the attention's output and logsumexp,
    gate and up; beside the layers, what enters the final norm and the rotary tables."""
    model, samples = fresh(tiny), padded(tokens)
    found = arch.groups(model)
    saved: dict[int, int] = {}
    held = []

    def pack(tensor):
        held.append(tensor)  # so that no address is used twice
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Bar("", 1) as bar, frozen(model):
        linears = arch.linears(model, found)
        scorer = Scorer(Results(linears, found, len(samples)), samples, 1.0, None, bar)
        replaced, blocks = instrument(model, dict(model.named_modules()), found, scorer)
        assert blocks
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        with forward_replaced(replaced), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.get_decoder()(inputs_embeds=embedded, use_cache=False)
    q, kv, h, i = tiny.heads * tiny.head_dim, tiny.kv_heads * tiny.head_dim, tiny.hidden, tiny.intermediate
    per_layer = 4 * (2 * h + 2 * q + 2 * kv + 2 * i) + 4 * tiny.heads
    rotary = 2 * 4 * tokens.shape[1] * tiny.head_dim
    assert sum(saved.values()) <= tokens.numel() * (tiny.layers * per_layer + 4 * h) + rotary
    sizes = memory._sizes(model, arch.linears(model, found), found, samples, float64=False, kernels=False)
    assert sizes.kept_all == tiny.layers * per_layer


def test_nothing_outlives_the_pass(gqa, tokens, way):
    def large():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) and o.shape[:2] == (4, 17) for o in gc.get_objects())

    hk.calibrate(gqa, tokens, **way)
    before = large()
    hk.calibrate(gqa, tokens, **way)
    assert large() == before


def test_recipe_lets_go_after_the_last_use():
    calls = []

    def double(x):
        calls.append(x.shape)
        return 2 * x

    x = torch.arange(3.0, requires_grad=True)
    y = recompute.apply(recompute.Rerun(double), x)
    first, second = recompute.recipe(y), recompute.recipe(y)
    assert first is second
    assert len(calls) == 1
    assert first.take().tolist() == [0.0, 2.0, 4.0]
    assert second.take().tolist() == [0.0, 2.0, 4.0]
    assert len(calls) == 2
    assert second._sources == ()
    assert second._value is None
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_hooks_of_modules_stay_in_the_graph(gqa, tokens, engine):
    """A user's forward hooks on linear layers, norms and MLPs count in every pass."""
    layer = gqa.model.layers[1]
    modules = (layer.mlp.down_proj, layer.mlp.up_proj, layer.mlp, layer.input_layernorm)
    for module in modules:
        module.register_forward_hook(lambda module, args, output: torch.tanh(output))
    want = plain_statistics(gqa, list(tokens))
    for mode in MODES if engine == "fused" else ("fast", "lean"):
        got = hk.calibrate(gqa, tokens, engine=engine, memory=mode)
        for name, (fine, _coarse) in want.items():
            error = (got.fine[name]["second"].double() - fine["second"]).abs().max() / fine["second"].abs().max()
            assert float(error) <= 2e-5


def test_hooks_on_a_layer_need_the_fast_mode(gqa, tokens):
    gqa.model.layers[1].register_forward_hook(lambda module, args, output: torch.tanh(output))
    want = plain_statistics(gqa, list(tokens))["model.layers.0.mlp"][0]["first"]
    got = hk.calibrate(gqa, tokens, memory="fast").fine["model.layers.0.mlp"]["first"]
    assert float((got.double() - want).abs().max() / want.abs().max()) <= 2e-5
    for mode in ("lean", "layerwise"):
        with pytest.raises(HywiaError, match="no hooks on decoder layers, got some on layer 1"):
            hk.calibrate(gqa, tokens, memory=mode)


def needs(model, tokens):
    found, samples = arch.groups(model), padded(tokens)
    float64 = ops.choose("linear_importance", None, model.lm_head.weight) == "reference"
    sizes = memory._sizes(model, arch.linears(model, found), found, samples, float64=float64, kernels=False)
    return sizes, samples


def test_auto_takes_the_first_mode_that_fits(gqa, tokens, monkeypatch):
    many = tokens.repeat(8, 1)
    monkeypatch.setattr(memory, "CHUNK_TOKENS", 34)
    sizes, samples = needs(gqa, many)
    fast, lean = sizes.fast(samples.total), sizes.lean(samples.total)
    layerwise = sizes.layerwise(samples.total, 34, False)
    assert layerwise < lean < fast
    free = 0
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    for needed, mode in ((fast, "fast"), (lean, "lean"), (layerwise, "layerwise")):
        free = int(needed / memory._SHARE) + 1
        record = hk.calibrate(gqa, many, engine="fused").record
        assert (record["memory"], record["estimate_bytes"]) == (mode, needed)
    free = sizes.layerwise(samples.total, 17, False) // 2
    with pytest.raises(
        HywiaError, match=r"^batches: 32 samples with 544 tokens need about .* GB free on cpu; pass few"
    ):
        hk.calibrate(gqa, many, engine="fused")
    assert hk.calibrate(gqa, tokens, engine="fused", memory="lean").record["memory"] == "lean"  # asked for: tried


def test_auto_is_lean_where_fast_would_keep_more_than_is_modest(gqa, tokens, monkeypatch):
    assert hk.calibrate(gqa, tokens).record["memory"] == "fast"
    monkeypatch.setattr(memory, "_MODEST_BYTES", 0)  # this model's weights are small beside its activations
    assert hk.calibrate(gqa, tokens).record["memory"] == "lean"


def test_auto_goes_on_with_the_next_mode_when_memory_runs_out(gqa, tokens, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("no room")

    want = hk.calibrate(gqa, tokens, memory="lean")
    monkeypatch.setattr(whole, "run", full)
    got = hk.calibrate(gqa, tokens)
    assert got.record["memory"] == "lean"
    assert worst(got, want) == 0.0
    with pytest.raises(HywiaError, match=r"^batches: 4 samples do not fit into the memory of cpu in mode 'fast'"):
        hk.calibrate(gqa, tokens, memory="fast")


def test_very_ragged_samples_go_layerwise(gqa, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    samples = [torch.randint(0, 256, (n,), generator=generator) for n in (90, 5, 6, 4, 5)]
    monkeypatch.setattr(memory, "CHUNK_TOKENS", 40)
    chosen = hk.calibrate(gqa, samples)
    assert (chosen.record["memory"], chosen.record["runs"]) == ("layerwise", 2)
    assert worst(chosen, hk.calibrate(gqa, samples, memory="fast")) <= 1e-5


def test_runs_hold_neighbours_in_length():
    rows = [torch.zeros(n, dtype=torch.long) for n in (9, 2, 5, 2, 9)]
    chunks = padded(rows).sorted().chunks(10)
    assert [(c.index.tolist(), c.longest) for c in chunks] == [([1, 3], 2), ([2], 5), ([0], 9), ([4], 9)]
    assert [c.offsets() for c in chunks] == [[0, 2, 4], [0, 5], [0, 9], [0, 9]]


def test_estimates_for_the_shapes_of_llama_7b():
    """10 and 128 samples of 128 tokens in bfloat16, beside the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig()).to(torch.bfloat16)
    found = arch.groups(model)
    weights = sum(2 * p.numel() for p in model.parameters())
    ten, many = (padded(torch.zeros(s, 128, dtype=torch.long)) for s in (10, 128))
    small, large = (
        memory._sizes(model, arch.linears(model, found), found, s, float64=False, kernels=True) for s in (ten, many)
    )
    assert small.kept == 2 * (6 * 4096 + 2 * 11008) + 4 * 32
    assert small.fast(10 * 128) < 0.35 * weights
    assert small.lean(10 * 128) < 0.10 * weights
    assert large.lean(128 * 128) < 0.60 * weights
    kept = small.kept_layers(10 * 128, weights)
    assert kept == 5  # last layers that lean does not run twice
    assert small.lean(10 * 128, kept) - small.lean(10 * 128) == kept * 10 * 128 * small.kept <= 0.05 * weights
    assert large.kept_layers(128 * 128, weights) == 0


@pytest.mark.parametrize("kept", [1, 2])
def test_lean_does_not_run_the_layers_twice_that_it_keeps(gqa, tokens, kept, monkeypatch):
    want = hk.calibrate(gqa, tokens, memory="lean")
    runs = []
    forward = block.Block.forward
    monkeypatch.setattr(block.Block, "forward", lambda self, *a: runs.append(a[2]) or forward(self, *a))
    plan = statistics.plan_memory
    monkeypatch.setattr(statistics, "plan_memory", lambda *a, **k: dataclasses.replace(plan(*a, **k), kept_layers=kept))
    got = hk.calibrate(gqa, tokens, memory="lean")
    layers = gqa.config.num_hidden_layers
    assert runs == [False] * (layers - kept) + [True] * kept + [True] * (layers - kept)
    for name in want.fine:
        assert torch.equal(got.coarse[name], want.coarse[name])
        assert all(torch.equal(got.fine[name][order], want.fine[name][order]) for order in want.fine[name])


@pytest.mark.parametrize("mode", MODES)
def test_a_failure_leaves_the_model_as_it_was(gqa, tokens, mode, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("from inside")

    gqa.train()
    gqa.model.norm.weight.grad = torch.ones(48)
    monkeypatch.setattr(Scorer, "score", fail)
    with pytest.raises(ValueError, match="from inside"):
        hk.calibrate(gqa, tokens, memory=mode)
    assert gqa.training
    assert all(m.training for m in gqa.modules())
    assert all(p.requires_grad for p in gqa.parameters())
    assert all("forward" not in vars(m) for m in gqa.modules())
    assert [n for n, p in gqa.named_parameters() if p.grad is not None] == ["model.norm.weight"]


def test_float16_loss_scale_is_lowered_until_nothing_overflows(gqa, tokens, way):
    with torch.no_grad():
        gqa.lm_head.weight.mul_(24.0)
        gqa.model.norm.weight.mul_(24.0)
    exact = hk.calibrate(gqa, tokens, **way)
    half = hk.calibrate(copy.deepcopy(gqa).half(), tokens, **way)
    assert half.record["loss_scale"] < 2.0**16
    for group in exact.groups:
        want = exact.fine[group.name]["second"]
        error = (half.fine[group.name]["second"] - want).abs().max() / want.max()
        assert float(error) <= 0.1


def test_a_changed_head_is_refused(gqa, tokens):
    gqa.config.final_logit_softcapping = 30.0
    with pytest.raises(HywiaError, match=r"config sets final_logit_softcapping=30\.0"):
        hk.calibrate(gqa, tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "fast"}, "engine: expected one of auto, fused, autograd, got 'fast'"),
        ({"memory": "small"}, "memory: expected one of auto, fast, lean, layerwise, got 'small'"),
        ({"engine": "autograd", "memory": "layerwise"}, "memory: expected auto, fast or lean with engine 'autograd'"),
    ],
)
def test_unknown_choices(gqa, tokens, arguments, message):
    with pytest.raises(UsageError, match=message):
        hk.calibrate(gqa, tokens, **arguments)


def test_loss_gradient_equals_autograd_over_all_logits(gqa, tokens, monkeypatch):
    samples = padded([tokens[0], tokens[1, :9], tokens[2, :2]])
    hidden = torch.randn(3, 17, 48, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("hywia_kernels.engine.loss.LOGIT_BYTES", 5 * 4 * 259)
    gradient, total = hidden_gradient(gqa, hidden, targets(samples, hidden.device), 8.0)
    leaf = hidden.clone().requires_grad_()
    want = 0.0
    for row, length, ids in zip(leaf, samples.lengths, samples.tokens, strict=True):
        want = want + torch.nn.functional.cross_entropy(gqa.lm_head(row[: length - 1]), ids[1:length])
    (expected,) = torch.autograd.grad(8.0 * want, leaf)
    assert float(total) == pytest.approx(float(want), rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    assert not bool(gradient[1, 8:].any())


def test_reproducible_kernels_are_a_matter_of_the_pass(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with reproducible(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with reproducible(False):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("blocks", ["layers", "modules"])
def test_a_dispatched_model_keeps_its_device_hooks(gqa, tokens, way, blocks):
    """accelerate's hooks, which move inputs between devices, replace `forward`; here every device is the CPU."""
    accelerate = pytest.importorskip("accelerate")
    want = hk.calibrate(gqa, tokens, **way)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for i in range(3):
        parts = [""] if blocks == "layers" else [f".{name}" for name, _ in gqa.model.layers[i].named_children()]
        device_map |= {f"model.layers.{i}{part}": "cpu" for part in parts}
    accelerate.dispatch_model(gqa, device_map=device_map, force_hooks=True)
    before = {name: vars(m).get("forward") for name, m in gqa.named_modules()}
    assert before["model.norm"] is not None
    assert worst(hk.calibrate(gqa, tokens, **way), want) <= 1e-6
    assert {name: vars(m).get("forward") for name, m in gqa.named_modules()} == before
