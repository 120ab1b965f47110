"""Second moments on the GPU: bfloat16 products with float32's accuracy, and what is solved with them."""

from __future__ import annotations

import copy

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.method.head_residual import head_residuals
from hywia_kernels.method.moments import add_products, exact_products, zero_moments
from tests.support.cuts import make_plan
from tests.support.tiny import TINY, fresh

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def correlated(tokens, columns, dtype, seed):
    """Activations with a few large columns, a few large tokens, and much in common."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def made(*size):
        return torch.randn(size, generator=generator, device="cuda")

    x = made(tokens, 4) @ made(4, columns) + 0.3 * made(tokens, columns)
    x[:, ::17] *= 30.0
    x[::101] *= 20.0
    return x.to(dtype)


def error(total, left, right):
    left, right = left.double(), right.double()
    return float(((total - left.T @ right).abs() / (left.norm(dim=0)[:, None] * right.norm(dim=0))).max())


@pytest.mark.parametrize("tokens", [1, 100, 5000, 32768])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_are_nearly_as_exact_as_float32s(dtype, tokens):
    """A tensor core cuts off what it adds, up to 4e-6 of the norms' product after 1,024 tokens; TF32's products would
    be a hundred times further off."""
    x, r = correlated(tokens, 520, dtype, 0), correlated(tokens, 264, torch.float32, 1)
    left = x.float() * (torch.rand(tokens, 1, device="cuda") + 0.1)
    with exact_products(x.device):
        whole = (left.T @ x.float()).double()
    for a, b in ((left, x), (x, r)):
        total = zero_moments(a.shape[1], b.shape[1], a.device)
        add_products(total, a, b)
        assert error(total, a, b) <= 7e-6
        before = total.clone()
        add_products(total, a, b)
        torch.testing.assert_close(total, 2 * before, rtol=1e-12, atol=0)
    assert error(whole, left, x) <= 4e-6


def test_heads_and_refits_are_those_of_the_cpu():
    """In float32, where nothing but the moments' rounding differs."""
    text = torch.randint(0, 256, (24, 19), generator=torch.Generator().manual_seed(3))
    here, there = fresh(TINY[2]), fresh(TINY[2]).cuda()
    want, got = head_residuals(here, text), head_residuals(there, text)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-9)
    plan = make_plan(here, "both")
    other = copy.deepcopy(there)
    errors = hk.reconstruct(here, plan, text).record["refit"]["relative_error"]
    found = hk.reconstruct(other, plan, text).record["refit"]["relative_error"]
    for name, pair in errors.items():
        assert found[name] == pytest.approx(pair, rel=1e-3)
    for (name, a), b in zip(here.named_parameters(), other.named_parameters(), strict=True):
        assert torch.allclose(a, b[1].cpu(), rtol=1e-2, atol=1e-4), name
