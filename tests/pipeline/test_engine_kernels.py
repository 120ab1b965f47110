"""Norm, gate and rotary embedding by Triton against Hugging Face's eager code and autograd."""

from __future__ import annotations

import os

import pytest
import torch
from transformers.models.llama import modeling_llama

import hywia_kernels as hk
from hywia_kernels.engine import instrument, kernels, rotary

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
    for mode in ("fast", "lean"):
        fused = hk.calibrate(gqa, tokens, engine="fused", memory=mode, backend=None if not ON_CPU else "reference")
        for name, fine in plain.fine.items():
            for order, want in fine.items():
                error = (fused.fine[name][order] - want).abs().max() / want.abs().max()
                assert float(error) <= 1e-5
    assert modeling_llama.apply_rotary_pos_emb is before


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
