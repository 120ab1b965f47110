"""Second moments: in full float32 whatever the process allows, and named where they are no numbers."""

from __future__ import annotations

import threading

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.method import moments
from hywia_kernels.method.head_residual import head_residuals
from hywia_kernels.method.moments import (
    add_products,
    bfloat16_parts,
    cholesky_factor,
    energy,
    exact_products,
    zero_moments,
)
from hywia_kernels.ops.precision import full_float32
from tests.support.tiny import TINY, fresh, make_plan

BACKENDS = torch.backends
SETTINGS = {"cuda": BACKENDS.cuda.matmul, "cpu": BACKENDS.mkldnn.matmul}


@pytest.fixture
def text():
    return torch.randint(0, 256, (12, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _precision_as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")
    for settings in (BACKENDS, *SETTINGS.values()):
        settings.fp32_precision = "none"


def old_flag():
    BACKENDS.cuda.matmul.allow_tf32 = True


def old_function():
    torch.set_float32_matmul_precision("medium")


def one_setting(value):
    def set_it():
        for settings in SETTINGS.values():
            settings.fp32_precision = value

    return set_it


def wide_setting():
    BACKENDS.fp32_precision = "tf32"


def shown():
    """All that a user can see, the older flags too, which raise where the new setting is in use."""

    def read(get):
        try:
            return get()
        except RuntimeError as error:
            return type(error)

    return [
        BACKENDS.fp32_precision,
        *(settings.fp32_precision for settings in SETTINGS.values()),
        read(lambda: BACKENDS.cuda.matmul.allow_tf32),
        read(torch.get_float32_matmul_precision),
    ]


WAYS = {
    "untouched": lambda: None,
    "allow_tf32": old_flag,
    "set_float32_matmul_precision": old_function,
    "fp32_precision": one_setting("tf32"),
    "fp32_precision ieee": one_setting("ieee"),
    "of everything": wide_setting,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("device", SETTINGS)
def test_products_are_full_inside_and_the_setting_is_as_it_was(way, device):
    WAYS[way]()
    before = shown()
    with full_float32(device), full_float32(device):
        assert SETTINGS[device].fp32_precision in ("none", "ieee")
    assert shown() == before
    with pytest.raises(ValueError, match="inside"), full_float32(device):
        raise ValueError("inside")
    assert shown() == before


@pytest.mark.parametrize("device", SETTINGS)
def test_a_setting_that_follows_the_wider_one_goes_on_following(device):
    wide_setting()
    with full_float32(device):
        assert SETTINGS[device].fp32_precision == "ieee"
    BACKENDS.fp32_precision = "ieee"
    assert SETTINGS[device].fp32_precision == "ieee"
    BACKENDS.fp32_precision = "tf32"
    assert SETTINGS[device].fp32_precision == "tf32"


def test_two_threads_leave_the_setting_in_any_order():
    one_setting("tf32")()
    entered, go = threading.Event(), threading.Event()

    def hold():
        with full_float32("cuda"):
            entered.set()
            go.wait(10)

    thread = threading.Thread(target=hold)
    with full_float32("cuda"):
        thread.start()
        assert entered.wait(10)
    assert BACKENDS.cuda.matmul.fp32_precision == "ieee"  # the other one is inside
    go.set()
    thread.join()
    assert BACKENDS.cuda.matmul.fp32_precision == "tf32"


def test_only_devices_that_have_narrower_products_are_asked():
    one_setting("tf32")()
    with exact_products(torch.device("cpu")):
        assert BACKENDS.cuda.matmul.fp32_precision == "tf32"
    with exact_products(torch.device("cpu"), torch.device("cuda", 1)):
        assert BACKENDS.cuda.matmul.fp32_precision == "ieee"
    assert BACKENDS.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("way", WAYS)
def test_the_whole_work_under_either_setting(text, way):
    model = fresh(TINY[2])
    plan = make_plan(model, "both")
    WAYS[way]()
    before = shown()
    left = head_residuals(model, text)
    hk.calibrate(model, text)
    after = hk.reconstruct(model, plan, text)
    hk.prune(model, after)
    assert shown() == before
    assert all(bool((v > 0).all()) for v in left.values())
    assert all(new < old for old, new in after.record["refit"]["relative_error"].values())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("layer", [0, 2])
def test_activations_that_are_no_numbers_are_named(gqa, text, value, layer):
    with torch.no_grad():
        gqa.model.layers[layer].self_attn.v_proj.weight[0, 0] = value
    name = rf"model\.layers\.{layer}\.self_attn\.o_proj: expected finite activations, got NaN or Inf"
    with pytest.raises(HywiaError, match=name):
        head_residuals(gqa, text)
    with pytest.raises(HywiaError, match=name):
        hk.reconstruct(gqa, make_plan(gqa, "attention"), text)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in gqa.modules())


def test_the_factor_is_of_the_damped_moments():
    x = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x
    kept = gram.clone()
    want = gram + 0.5 * gram.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    factor = cholesky_factor(gram, 0.5, "x")
    torch.testing.assert_close(moments.damped(gram, 0.5), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(gram, kept)
    torch.testing.assert_close(factor @ factor.T, want, rtol=1e-12, atol=1e-12)
    assert bool((factor.triu(1) == 0).all())
    with pytest.raises(HywiaError, match=r"^x: second moments of its inputs are singular; use a larger ridge"):
        cholesky_factor(-gram, 0.0, "x")
    bad = gram.clone()
    bad[1, 2] = float("nan")  # above the diagonal, where a factorisation need not look
    with pytest.raises(HywiaError, match=r"^x: expected finite activations"):
        cholesky_factor(bad, 0.5, "x")


def correlated(tokens, columns, dtype, seed=0):
    """Activations with a few large columns, a few large tokens, and much in common."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    x = shared + 0.3 * torch.randn(tokens, columns, generator=generator)
    x[:, ::17] *= 30.0
    x[::101] *= 20.0
    return x.to(dtype)


def error(total, left, right):
    """Largest error of a moment, as a share of the product of its two columns' norms."""
    left, right = left.double(), right.double()
    return float(((total - left.T @ right).abs() / (left.norm(dim=0)[:, None] * right.norm(dim=0))).max())


def summed(left, right):
    total = zero_moments(left.shape[1], right.shape[1], left.device)
    add_products(total, left, right)
    return total


@pytest.mark.parametrize("tokens", [1, 100, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_as_exact_as_float32s(dtype, tokens):
    """And sums that were there are added to."""
    x, weight = correlated(tokens, 60, dtype), torch.rand(tokens, generator=torch.Generator().manual_seed(1)) + 0.1
    left = x.float() * weight[:, None]
    total = summed(left, x)
    whole = (left.T @ x.float()).double()
    assert error(total, left, x) <= max(2e-7, 1.05 * error(whole, left, x))
    before = total.clone()
    add_products(total, left, x)
    torch.testing.assert_close(total, 2 * before, rtol=1e-12, atol=0)


def test_products_of_float64_are_float64s():
    x = torch.randn(3000, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert error(summed(x, x), x, x) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parts_add_up_to_the_number(dtype):
    x = correlated(40, 50, dtype, seed=3)
    parts = bfloat16_parts(x)
    assert len(parts) == {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]
    assert all(part.dtype is torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), x.double())


@pytest.mark.parametrize(
    ("left", "right", "products"),
    [
        (torch.float32, torch.bfloat16, 3),
        (torch.bfloat16, torch.float32, 3),
        (torch.float32, torch.float32, 6),
        (torch.float16, torch.float32, 5),
        (torch.bfloat16, torch.bfloat16, 1),
    ],
    ids=str,
)
def test_products_of_parts_are_as_exact_as_float32s(monkeypatch, left, right, products):
    """What a GPU's tensor cores are asked for, in exact arithmetic: the parts left out do not count."""
    taken = []

    def mm(a, b, out_dtype=None):
        assert (a.dtype, b.dtype, out_dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        taken.append(a.shape[1])
        return a.double() @ b.double()

    monkeypatch.setattr(torch, "mm", mm)
    a, b = correlated(700, 30, left, seed=4), correlated(700, 20, right, seed=5)
    total = moments._of_parts(a, b)
    assert taken == [700 * products]
    assert error(total, a, b) <= 2**-24


def test_energy_is_weighted_and_in_float64():
    x = torch.full((3, 4), 1e18)
    weight = torch.tensor([1.0, 0.5, 0.25])
    assert energy(x, weight).dtype is torch.float64
    assert float(energy(x, weight)) == pytest.approx(1.75 * 4e36, rel=1e-6)
