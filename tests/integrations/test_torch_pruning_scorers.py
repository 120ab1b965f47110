"""Odd groups, what is kept between groups and steps, second order from one pass, and HyWIA."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch_pruning_flow import accumulated, backward, function, hand_group, heads_of, made, pruner_of, theirs

import hywia_kernels as hk
from hywia_kernels import UsageError
from hywia_kernels.integrations import torch_pruning as ours
from hywia_kernels.integrations.measured import measured
from tests.support.nets import Group, llama


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    ours.clear_fisher()


def test_members_that_are_not_scored():
    linear = nn.Linear(2, 3)
    group = hand_group(linear).add(object(), function.prune_linear_out_channels, range(3))
    group.add(nn.Parameter(torch.ones(3)), function.prune_parameter_out_channels, range(3))
    group.add(nn.BatchNorm1d(3, affine=False), function.prune_batchnorm_out_channels, range(3))
    group.add(nn.Linear(2, 3), function.prune_linear_out_channels, range(2), [None, 1])  # nobody knows whose
    want = linear.weight.detach().square().sum(1)
    torch.testing.assert_close(ours.MagnitudeImportance(normalizer=None)(group), want)
    alone = Group().add(object(), function.prune_linear_out_channels, range(3))
    assert ours.MagnitudeImportance()(alone) is None


def test_a_part_of_the_channels():
    linear = nn.Linear(2, 6)
    group = Group().add(linear, function.prune_linear_out_channels, [4, 1], [0, 1])
    torch.testing.assert_close(
        ours.MagnitudeImportance(normalizer=None)(group), linear.weight.detach()[[4, 1]].square().sum(1)
    )


def test_every_weight_is_read_once_while_nothing_changes():
    model, inputs, groups = made("llama")
    scorer = ours.TaylorImportance()
    matrices = 2 * 7 + 1  # every one of the decoder's in two groups, and the head
    with scorer.unchanged():
        first = [scorer(g) for g in groups]
        assert scorer.cache.reads == matrices
        again = [scorer(g) for g in groups]
        assert scorer.cache.reads == matrices
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        backward(model, inputs.flip(0))  # gradients in new tensors
        [scorer(g) for g in groups]
        assert scorer.cache.reads == 2 * matrices
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
        doubled = [scorer(g) for g in groups]
        assert scorer.cache.reads == 2 * matrices + 1
    fresh = ours.TaylorImportance()
    assert all(torch.equal(a, fresh(g)) for a, g in zip(doubled, groups, strict=True))
    assert fresh.cache.reads == 4 * 7 + 1, "twice, where nobody says that nothing changes"


@pytest.mark.parametrize("change", ["weight", "grad", "grad in place", "replaced"])
def test_changes_are_seen(change):
    linear = nn.Linear(2, 3)
    linear.weight.grad = torch.ones(3, 2)
    scorer = ours.TaylorImportance(normalizer=None)
    scorer(hand_group(linear))
    with torch.no_grad():
        if change == "weight":
            linear.weight.add_(1.0)
        elif change == "grad":
            linear.weight.grad = torch.full((3, 2), 2.0)
        elif change == "grad in place":
            linear.weight.grad.mul_(3.0)
        else:
            grad = linear.weight.grad
            linear.weight = nn.Parameter(torch.ones(3, 2))
            linear.weight.grad = grad
    want = (linear.weight.detach() * linear.weight.grad).abs().sum(1)
    torch.testing.assert_close(scorer(hand_group(linear)), want)


def test_iterative_pruning_reads_the_pruned_weights():
    model, inputs = llama(8), torch.randint(96, (2, 12))
    scorer = ours.TaylorImportance()
    pruner = pruner_of(model, scorer, iterative_steps=2)
    for heads in (6, 3):  # of eight, then half of those that are left
        backward(model, inputs)
        pruner.step()
        assert model.model.layers[1].self_attn.q_proj.weight.shape[0] == 8 * heads
        for layer in model.model.layers:
            layer.self_attn.num_heads = heads
    assert scorer.cache.reads == 2 * 15


# Second order from one pass, and HyWIA.


def test_accumulate_fisher_is_the_mean_over_samples():
    model, inputs, groups = made("llama-gqa")
    loop, one_pass = (ours.HessianImportance(normalizer=None, group_reduction="sum") for _ in range(2))
    accumulated(loop, model, inputs, samples=3)
    model.zero_grad()
    ours.accumulate_fisher(model, inputs)
    assert all(p.grad is None for p in model.parameters())
    compared = 0
    for group in groups:
        if any(item.dep.target.module is model.lm_head for item in group):
            continue  # the head is not measured
        a, b = loop(group), one_pass(group)
        assert (a - b).abs().max() <= 2e-6 * a.abs().max()
        compared += 1
    assert compared == len(groups) - 1
    head = model.lm_head
    assert measured(head, "in") is None
    hidden = next(g for g in groups if any(item.dep.target.module is head for item in g))
    assert one_pass(hidden).shape == (64,)


def test_accumulate_fisher_serves_first_order_where_there_is_no_gradient():
    model, inputs, groups = made("llama")
    want = [ours.TaylorImportance()(g) for g in groups]
    model.zero_grad()
    ours.accumulate_fisher(model, inputs)
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    attention = [g for g in groups if len(g[0].idxs) == 64][1:] + [g for g in groups if len(g[0].idxs) == 80]
    for group in attention:
        got, expected = ours.TaylorImportance()(group), want[groups.index(group)]
        assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_measured_weights_that_have_changed():
    model, inputs, groups = made("llama")
    model.zero_grad()
    ours.accumulate_fisher(model, inputs, axes="units")
    with pytest.raises(UsageError, match="got the others only; call accumulate_fisher"):
        [ours.HessianImportance()(g) for g in groups]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    with pytest.raises(UsageError, match=r"Linear \[80, 64\]: expected the weight that was measured, got one that has"):
        [ours.HessianImportance()(g) for g in groups if len(g[0].idxs) == 80]
    with pytest.raises(UsageError, match="axes: expected one of units, both, got 'rows'"):
        ours.accumulate_fisher(model, inputs, axes="rows")


@pytest.mark.parametrize("fusion", ["attention", "fine", "coarse", "mean", "product"])
@pytest.mark.parametrize("name", ["llama", "llama-gqa"])
def test_hywia_says_what_the_package_says(fusion, name):
    """MLP channels, and whole heads where every query head has its own key, get `hk.score`'s own scores."""
    model, inputs, groups = made(name)
    model.zero_grad()
    ours.accumulate_fisher(model, inputs)
    own = hk.score(model, inputs, fusion=fusion)
    scorer = ours.HyWIAImportance(fusion=fusion, num_heads=heads_of(model))
    seen = 0
    for i, layer in enumerate(model.model.layers):
        for group in groups:
            members = [item.dep.target.module for item in group]
            if layer.mlp.up_proj in members and len(group[0].idxs) == 80:
                torch.testing.assert_close(scorer(group), own.values[f"model.layers.{i}.mlp"], rtol=1e-4, atol=1e-4)
                seen += 1
            if layer.self_attn.o_proj in members and layer.self_attn.q_proj in members and len(group) < 60:
                got = scorer(group)
                assert torch.equal(got, got.view(8, 8)[:, :1].expand(8, 8).flatten())  # a score a head
                if name == "llama":
                    want = own.values[f"model.layers.{i}.attention"]
                    torch.testing.assert_close(got.view(8, 8)[:, 0], want, rtol=1e-4, atol=1e-4)
                seen += 1
    assert seen == 4


def test_hywia_from_gradients():
    """Fine is a sum of absolute values; coarse keeps the sign over a head, and only there."""
    query, output = nn.Linear(1, 4, bias=False), nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        query.weight.copy_(torch.tensor([[1.0], [-2], [3], [4]]))
        output.weight.copy_(torch.tensor([[1.0, 1, 1, 1]]))
    for linear in (query, output):
        linear.weight.grad = torch.ones_like(linear.weight)
    group = Group().add(output, function.prune_linear_in_channels, range(4))
    group.add(query, function.prune_linear_out_channels, range(4))
    by_head = {
        f: ours.HyWIAImportance(f, order="first", num_heads={query: 2})(group).tolist() for f in ("fine", "coarse")
    }
    assert by_head == {"fine": [5.0, 5.0, 9.0, 9.0], "coarse": [3.0, 3.0, 9.0, 9.0]}
    by_channel = ours.HyWIAImportance("coarse", order="first")(group)
    assert by_channel.tolist() == [2.0, 3.0, 4.0, 5.0]
    scaled = ours.HyWIAImportance("coarse", order="first", normalizer="max")(group)
    assert scaled.tolist() == pytest.approx([0.4, 0.6, 0.8, 1.0])


def test_hywia_refuses_what_it_cannot_do():
    with pytest.raises(UsageError, match="fusion: expected one of fine, attention"):
        ours.HyWIAImportance("best")
    with pytest.raises(UsageError, match="order: expected one of first, second, mixed, got 'third'"):
        ours.HyWIAImportance(order="third")
    with pytest.raises(UsageError, match=r"expected accumulate_fisher\(model, batches\) before scoring with 'second'"):
        ours.HyWIAImportance()(hand_group(nn.Linear(2, 3)))


def test_a_pruner_takes_hywia():
    model, inputs = llama(kv_heads=2), torch.randint(96, (3, 12))
    heads = heads_of(model)
    pruner = pruner_of(model, ours.HyWIAImportance(num_heads=heads))
    ours.accumulate_fisher(model, inputs)
    pruner.step()
    for layer in model.model.layers:
        assert layer.self_attn.q_proj.weight.shape == (32, 32)
        layer.self_attn.num_key_value_groups = 2
    assert model(inputs[:, :4]).logits.shape == (3, 4, 96)


def test_other_names_are_upstreams():
    assert ours.RandomImportance is theirs.RandomImportance
    assert isinstance(ours.TaylorImportance(), theirs.TaylorImportance)
    assert ours.GroupTaylorImportance is ours.TaylorImportance
    with pytest.raises(AttributeError):
        ours.NoSuchImportance  # noqa: B018


@pytest.mark.parametrize("reduction", ["median", "any"])
def test_an_unknown_reduction(reduction):
    with pytest.raises(UsageError, match="group_reduction: expected one of"):
        ours.MagnitudeImportance(group_reduction=reduction)(hand_group(nn.Linear(2, 3)))
