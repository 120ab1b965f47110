"""Our scorers against the installed Torch-Pruning's: the same numbers and cuts, where no difference is listed.

`test_torch_pruning_versions` runs this file and its neighbours again with the oldest supported version.
"""

from __future__ import annotations

import pytest
import torch
from torch_pruning_flow import CRITERIA, accumulated, backward, made, pruner_of, theirs

from hywia_kernels.integrations import torch_pruning as ours
from tests.support.nets import llama

REDUCTIONS = ("sum", "mean", "max", "prod", "first", "gate", None)
NORMALIZERS = (None, "sum", "standarization", "mean", "max", "gaussian", "sentinel_0.5", "lamp", torch.sqrt)
SUBTRACTING = ("standarization", "gaussian", "lamp")  # differences of near numbers: rounding is a larger part of them


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    ours.clear_fisher()


def assert_same(got, want, case, bound=1e-6):
    """`bound` of the vector's largest value, and the same better half; None alike."""
    if want is None:
        assert got is None, case
        return
    assert got.shape == want.shape, case
    assert got.dtype == torch.float32
    finite = torch.isfinite(want)
    assert torch.equal(finite, torch.isfinite(got)), case
    scale = want[finite].abs().max()
    assert (got - want)[finite].abs().max() <= bound * scale, (case, got, want)
    if want.dim() == 1 and bool(finite.all()):
        half = max(1, len(want) // 2)
        ties = (want.sort().values.diff() <= 2 * bound * scale).any()
        if not ties:
            assert set(got.topk(half).indices.tolist()) == set(want.topk(half).indices.tolist()), case


def assert_parity(name, criterion, cases, **options):
    model, inputs, groups = made(name)
    for reduction, normalizer in cases:
        mine, upstream = (
            getattr(module, criterion)(group_reduction=reduction, normalizer=normalizer, **options)
            for module in (ours, theirs)
        )
        if criterion == "HessianImportance":
            accumulated(mine, model, inputs)
            accumulated(upstream, model, inputs)
        for index, group in enumerate(groups):
            pristine = [list(item.idxs) for item in group]
            got = mine(group)
            assert [list(item.idxs) for item in group] == pristine
            bound = 2e-5 if normalizer in SUBTRACTING else 1e-6
            assert_same(got, upstream(group), (name, criterion, reduction, normalizer, index), bound)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["convolutions", "concatenated", "fused", "llama"])
def test_reductions(name, criterion):
    reductions = [r for r in REDUCTIONS if not (r is None and name in ("concatenated", "fused"))]  # unequal lengths
    assert_parity(name, criterion, [(r, None) for r in reductions])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["convolutions", "llama"])
def test_normalizers(name, criterion):
    assert_parity(name, criterion, [("mean", n) for n in NORMALIZERS])


def test_sums_over_flattened_channels():
    """Four columns of a linear layer a channel: where upstream adds them, so do we."""
    for criterion in CRITERIA:
        assert_parity("flattened", criterion, [("sum", None), ("mean", "mean")])


@pytest.mark.parametrize("name", ["convolutions", "fused"])
def test_biases_powers_and_signed_sums(name):
    assert_parity(name, "MagnitudeImportance", [("sum", None)], p=1, bias=True)
    assert_parity(name, "MagnitudeImportance", [("mean", "max")], p=3)
    assert_parity(name, "TaylorImportance", [("sum", None)], bias=True)
    assert_parity(name, "TaylorImportance", [("sum", None)], multivariable=True)
    assert_parity(name, "HessianImportance", [("sum", None)], bias=True)


def test_batch_norm_counts_in_magnitude_as_upstream():
    assert_parity("normalised", "MagnitudeImportance", [("sum", None), ("mean", "mean")], bias=True)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["normalised", "fused", "flattened", "concatenated", "llama-gqa"])
def test_compat_is_upstream_bit_for_bit(name, criterion):
    """Every reduction and normaliser, defects included, on the groups that show them."""
    model, inputs, groups = made(name)
    options = [(r, None) for r in REDUCTIONS if r is not None] + [("mean", n) for n in NORMALIZERS]
    for reduction, normalizer in options:
        said = []
        for module, more in ((ours, {"upstream_compat": True}), (theirs, {})):
            scorer = getattr(module, criterion)(group_reduction=reduction, normalizer=normalizer, **more)
            if criterion == "HessianImportance":
                accumulated(scorer, model, inputs, samples=2)
            said.append([scorer(group) for group in groups])
        for mine, upstream in zip(*said, strict=True):
            assert mine.shape[-1] > 0
            torch.testing.assert_close(mine, upstream, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_pruner_cuts_the_same(criterion):
    """Through upstream's own pruner: the same weights are left of a model with a key head for each query head."""
    left = []
    inputs = torch.randint(96, (1, 12))
    for module in (ours, theirs):
        torch.manual_seed(1)
        model = llama(8)
        scorer = getattr(module, criterion)()
        pruner = pruner_of(model, scorer)
        backward(model, inputs)
        if criterion == "HessianImportance":
            accumulated(scorer, model, inputs)
        pruner.step()
        left.append(model.state_dict())
    assert left[0]["model.layers.0.self_attn.q_proj.weight"].shape == (32, 32)
    for name, weight in left[0].items():
        assert torch.equal(weight, left[1][name]), name
