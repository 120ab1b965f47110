"""Second moments: in full float32 whatever the process allows, and named where they are no numbers."""

from __future__ import annotations

import threading

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.method.head_residual import head_residuals
from hywia_kernels.method.moments import cholesky_factor, exact_products
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
    assert torch.equal(gram, kept)
    torch.testing.assert_close(factor @ factor.T, want, rtol=1e-12, atol=1e-12)
    assert bool((factor.triu(1) == 0).all())
    with pytest.raises(HywiaError, match=r"^x: second moments of its inputs are singular; use a larger ridge"):
        cholesky_factor(-gram, 0.0, "x")
    bad = gram.clone()
    bad[1, 2] = float("nan")  # above the diagonal, where a factorisation need not look
    with pytest.raises(HywiaError, match=r"^x: expected finite activations"):
        cholesky_factor(bad, 0.5, "x")
