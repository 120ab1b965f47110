"""Norm, gate and rotary embedding by Triton against Hugging Face's eager code and autograd."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

import hywia_kernels as hk
from hywia_kernels.engine import flash, instrument, kernels, rotary
from hywia_kernels.engine.patches import forward_replaced, reproducible

triton = pytest.importorskip("triton")
ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if ON_CPU else "cuda"
pytestmark = pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="no CUDA device, no interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# About one rounding; Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest.
STEP = {torch.float32: 2e-6, torch.bfloat16: 2.0 ** (-6 if ON_CPU else -7), torch.float16: 2.0**-10}


def random(seed, *shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_near(got, want, dtype):
    assert got.dtype == want.dtype
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert float(error) <= STEP[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [48, 576, 4096])
def test_norm(dtype, columns):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(columns, eps=1e-5).to(DEVICE, dtype)
    with torch.no_grad():
        norm.weight.copy_(random(0, columns, dtype=dtype))
    formula = kernels.norm_formula(norm, dtype, True)
    assert isinstance(formula, kernels.RmsNorm)
    x, dy = random(1, 2, 5, columns, dtype=dtype).requires_grad_(), random(2, 2, 5, columns, dtype=dtype)
    want = norm(x)
    (dx,) = torch.autograd.grad(want, x, dy)
    small = formula.small(x.detach())
    got, got_dx = formula.forward(x.detach(), *small), formula.backward(dy, x.detach(), *small)[0]
    assert_near(got, want.detach(), dtype)
    assert_near(got_dx, dx, dtype)
    if not ON_CPU:  # bit for bit: one that differs is a whole rounding step a few layers on
        assert torch.equal(got, want)
        assert torch.equal(got_dx, dx)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype):
    gate, up, dy = (4 * random(s, 3, 7, 1000, dtype=dtype) for s in range(3))
    formula = kernels.gate_formula(torch.nn.SiLU(), True)
    assert isinstance(formula, kernels.Gate)
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    want = torch.nn.functional.silu(leaves[0]) * leaves[1]
    expected = torch.autograd.grad(want, leaves, dy)
    kept = gate.clone(), up.clone()
    assert_near(formula.forward(gate, up), want.detach(), dtype)
    if not ON_CPU:
        assert torch.equal(formula.forward(gate, up), want)
    for got, wanted in zip(formula.backward(dy, gate, up), expected, strict=True):
        assert_near(got, wanted, dtype)
        if not ON_CPU and dtype != torch.float32:
            assert torch.equal(got, wanted)
    assert torch.equal(gate, kept[0])
    assert torch.equal(up, kept[1])


def test_other_functions_are_run_again_as_they_are(monkeypatch):
    assert isinstance(kernels.gate_formula(torch.nn.GELU(), True), kernels.Rerun)
    assert isinstance(kernels.gate_formula(torch.nn.SiLU(), False), kernels.Rerun)
    assert isinstance(kernels.norm_formula(torch.nn.LayerNorm(8), torch.float32, True), kernels.Rerun)
    norm = torch.nn.RMSNorm(8, eps=1e-5).half()
    assert isinstance(kernels.norm_formula(norm, torch.float32, True), kernels.Rerun)
    assert not kernels.usable(torch.device("cpu"), None)
    assert not kernels.usable(torch.device("cuda"), "reference")
    monkeypatch.setenv("HYWIA_BACKEND", "reference")
    assert not kernels.usable(torch.device("cuda"), None)


def test_statistics_with_the_kernels_in_place(gqa, tokens, monkeypatch):
    plain = hk.calibrate(gqa.to(DEVICE), tokens, engine="autograd")
    for module in (instrument, rotary):
        monkeypatch.setattr(module, "usable", lambda device, backend: True)
    before = modeling_llama.apply_rotary_pos_emb
    written_out = []
    forward = flash.FlashAttention.forward
    monkeypatch.setattr(flash.FlashAttention, "forward", lambda *a: written_out.append(1) or forward(*a))
    for mode in ("fast", "lean"):
        fused = hk.calibrate(gqa, tokens, engine="fused", memory=mode, backend=None if not ON_CPU else "reference")
        for name, fine in plain.fine.items():
            for order, want in fine.items():
                error = (fused.fine[name][order] - want).abs().max() / want.abs().max()
                assert float(error) <= 1e-5
    assert modeling_llama.apply_rotary_pos_emb is before
    layers = gqa.config.num_hidden_layers
    # float32 on a GPU is not for torch's flash kernel. Lean runs every layer twice.
    assert len(written_out) == (3 * layers if ON_CPU else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", [1, 2])
def test_rotary(dtype, tables):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, dq = (random(s, 2, 5, 6, 12, dtype=dtype).transpose(1, 2) for s in (0, 1))
    k, dk = (random(s, 2, 5, 3, 12, dtype=dtype).transpose(1, 2) for s in (2, 3))
    angle = random(4, tables, 5, 12, dtype=torch.float32)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    leaves, copies = ([t.clone().requires_grad_() for t in (q, k)] for _ in range(2))
    want = apply_rotary_pos_emb(*leaves, cos, sin)
    got = rotary.rotated(None)(*copies, cos, sin)
    for a, b in zip(got, want, strict=True):
        assert_near(a.detach(), b.detach(), dtype)
        assert a.transpose(1, 2).is_contiguous()
        assert ON_CPU or dtype == torch.float32 or torch.equal(a, b)
    expected = torch.autograd.grad(want, leaves, (dq, dk))
    for a, b in zip(torch.autograd.grad(got, copies, (dq, dk)), expected, strict=True):
        assert_near(a, b, dtype)
        assert ON_CPU or dtype == torch.float32 or torch.equal(a, b)


def test_rotary_leaves_other_rotations_to_the_model():
    seen = []
    apply = rotary.rotated(lambda q, k, cos, sin, unsqueeze_dim: seen.append(unsqueeze_dim) or (q, k))
    q = torch.zeros(1, 2, 4, 8)
    part, table = torch.zeros(1, 4, 4), torch.zeros(1, 4, 8)
    apply(q, q, part, part)  # a part of each head
    apply(q, q, table.half(), table.half())
    apply(q, q, table, table, unsqueeze_dim=2)
    assert seen == [1, 1, 2]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", DTYPES if ON_CPU else DTYPES[1:])  # on a GPU flash is for the narrow ones
def test_flash(dtype, kv_heads):
    """The attention between its projections, written out, against the module's own code and autograd."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=16)
    config._attn_implementation = "sdpa"
    module = modeling_llama.LlamaAttention(config, 0).to(DEVICE, dtype).eval()
    widths = 64, 16 * kv_heads, 16 * kv_heads
    made = [random(seed, 2, 6, width, dtype=dtype).requires_grad_() for seed, width in enumerate(widths)]
    angle = random(4, 1, 6, 8, dtype=torch.float32).repeat(1, 1, 2)
    keywords = {"position_embeddings": (angle.cos().to(dtype), angle.sin().to(dtype)), "attention_mask": None}
    left = []
    # Under the strict mode as in a pass: torch takes other kernels without it.
    with (
        reproducible(True),
        forward_replaced(
            [(module.q_proj, lambda x: made[0]), (module.k_proj, lambda x: made[1]), (module.v_proj, lambda x: made[2])]
            + [(module.o_proj, lambda x: left.append(x) or x)]
        ),
    ):
        module(hidden_states=made[0], **keywords)
    found = flash.flash_attention(module, True, {})
    assert found.serves(made, {**keywords, "use_cache": False, "position_ids": angle})
    assert not found.serves(made, {**keywords, "attention_mask": angle})
    assert not found.serves(made, {"position_embeddings": [t[..., :8] for t in keywords["position_embeddings"]]})
    core = found.forward(tuple(m.detach() for m in made), keywords)
    assert_near(core.out, left[0].detach(), dtype)
    assert (core.value is None) == (kv_heads == 2)
    if core.value is not None:
        assert torch.equal(core.value, made[2])
    gradient = random(5, *core.out.shape, dtype=dtype)
    with reproducible(True):
        wanted = torch.autograd.grad(left[0], made, gradient)
    for got, want in zip(core.backward(gradient), wanted, strict=True):
        assert got.shape == want.shape
        # Rotated forward and back by the interpreter, which truncates bfloat16 each time.
        error = (got.double() - want.double()).abs().max() / want.double().abs().max()
        assert float(error) <= 2 * STEP[dtype]
        assert ON_CPU or torch.equal(got, want)
    assert ON_CPU or torch.equal(core.out, left[0])


def test_flash_is_not_for_an_attention_of_somebodys_own():
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8)
    config._attn_implementation = "eager"
    module = modeling_llama.LlamaAttention(config, 0)
    assert flash.flash_attention(module, True, {}) is None
    config._attn_implementation = "sdpa"
    assert flash.flash_attention(module, True, {}).head_dim == 8
