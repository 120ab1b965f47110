"""Where our scorers differ from Torch-Pruning's, in the order in which the module lists it; upstream fails them all."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch_pruning_flow import backward, function, groups_of, hand_group, theirs

from hywia_kernels import UsageError
from hywia_kernels.integrations import torch_pruning as ours
from tests.support.nets import Group, llama

# A pass of upstream's would be news.
both = pytest.mark.parametrize(
    "importance",
    [pytest.param(theirs, marks=pytest.mark.xfail(strict=True, reason="Torch-Pruning's defect")), ours],
    ids=["theirs", "ours"],
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    ours.clear_fisher()


@both
def test_1_hessian_averages_over_its_calls(importance):
    linear = nn.Linear(2, 2, bias=False)
    scorer = importance.HessianImportance(normalizer=None)
    for g in (1.0, 2.0, 3.0):
        linear.weight.grad = torch.full_like(linear.weight, g)
        scorer.accumulate_grad(linear)
    want = (linear.weight.detach().square() * (14.0 / 3.0)).sum(1)
    torch.testing.assert_close(scorer(hand_group(linear)), want)


@both
def test_2_hessian_leaves_gradients_alone(importance):
    linear = nn.Linear(2, 3)
    linear.weight.grad, linear.bias.grad = torch.full((3, 2), -2.0), torch.ones(3)
    scorer = importance.HessianImportance()
    scorer.accumulate_grad(linear)
    scorer(hand_group(linear))
    assert linear.weight.grad.tolist() == [[-2.0, -2.0]] * 3


@both
def test_2_hessian_without_squares_is_an_error(importance):
    linear = nn.Linear(2, 3)
    linear.weight.grad = torch.ones(3, 2)
    with pytest.raises(UsageError, match="expected squares of gradients, got none; call accumulate_grad"):
        importance.HessianImportance()(hand_group(linear))


@both
def test_3_hessian_counts_a_batch_norms_bias(importance):
    norm = nn.BatchNorm1d(3)
    nn.init.constant_(norm.bias, 2.0)
    norm.weight.grad, norm.bias.grad = torch.zeros(3), torch.tensor([0.0, 1.0, 3.0])
    scorer = importance.HessianImportance(group_reduction="sum", normalizer=None, bias=True)
    scorer.accumulate_grad(norm)
    group = Group().add(norm, function.prune_batchnorm_out_channels, range(3))
    assert scorer(group).tolist() == [0.0, 4.0, 36.0]


@both
def test_4_taylor_counts_a_batch_norm(importance):
    linear, norm = nn.Linear(2, 3), nn.BatchNorm1d(3)
    linear.weight.grad, linear.bias.grad = torch.zeros(3, 2), torch.zeros(3)
    norm.weight.grad, norm.bias.grad = torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3)
    group = hand_group(linear).add(norm, function.prune_batchnorm_out_channels, range(3))
    scorer = importance.TaylorImportance(group_reduction="sum", normalizer=None)
    assert scorer(group).tolist() == [1.0, 2.0, 3.0]


@both
def test_5_key_and_value_heads_count(importance):
    """A KV head's score is shared by the query heads it serves, so a KV group's sum is that of its four matrices."""
    model = llama(kv_heads=2, layers=1)
    inputs = torch.randint(96, (3, 12))
    group = next(g for g in groups_of(model) if g[0].dep.target.module is model.model.layers[0].self_attn.o_proj)
    backward(model, inputs)
    got = importance.TaylorImportance(group_reduction="sum", normalizer=None)(group)
    attention = model.model.layers[0].self_attn
    terms = {n: (p := getattr(attention, n).weight).detach().mul(p.grad).abs() for n in ("q_proj", "k_proj", "v_proj")}
    output = attention.o_proj.weight.detach().mul(attention.o_proj.weight.grad).abs()
    per_kv_head = terms["q_proj"].view(2, -1).sum(1) + output.t().reshape(2, -1).sum(1)
    per_kv_head += terms["k_proj"].view(2, -1).sum(1) + terms["v_proj"].view(2, -1).sum(1)
    torch.testing.assert_close(got.view(2, -1).sum(1), per_kv_head)
    key = (terms["k_proj"] + terms["v_proj"]).sum(1).view(2, 1, 8).expand(2, 4, 8) / 4
    plain = terms["q_proj"].sum(1).view(2, 4, 8) + output.sum(0).view(2, 4, 8)
    torch.testing.assert_close(got, (plain + key).flatten())


@both
def test_6_indices_are_pairs_in_any_order(importance):
    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    with torch.no_grad():
        first.weight.zero_()
        second.weight.copy_(torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
    for linear in (first, second):
        linear.weight.grad = torch.ones(3, 2)
    group = hand_group(first).add(second, function.prune_linear_out_channels, [2, 0, 1], [0, 1, 2])
    got = importance.TaylorImportance(group_reduction="sum", normalizer=None)(group)
    assert got.tolist() == [3.0, 1.0, 2.0]
    assert group[1].idxs == [2, 0, 1]


@both
def test_7_channels_of_one_root_all_count(importance):
    conv, linear = nn.Conv2d(1, 2, 1), nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        linear.weight.copy_(torch.tensor([[2.0, 5, 3, 7, 1, 4]]))
    group = Group().add(conv, function.prune_conv_out_channels, range(2))
    group.add(linear, function.prune_linear_in_channels, range(6), [0, 0, 0, 1, 1, 1])
    scores = {
        r: importance.MagnitudeImportance(p=1, group_reduction=r, normalizer=None)(group).tolist()
        for r in ("max", "prod", "gate")
    }
    assert scores == {"max": [5.0, 7.0], "prod": [30.0, 28.0], "gate": [10.0, 12.0]}


@both
def test_7_scores_are_as_long_as_the_root(importance):
    """The root is no scored layer here, and the first that is has more channels."""
    norm, linear = nn.InstanceNorm1d(2, affine=True), nn.Linear(6, 1, bias=False)
    nn.init.constant_(linear.weight, 1.0)
    group = Group().add(norm, function.prune_instancenorm_out_channels, range(2))
    group.add(linear, function.prune_linear_in_channels, range(6), [0, 0, 0, 1, 1, 1])
    got = importance.MagnitudeImportance(p=1, group_reduction="sum", normalizer=None)(group)
    assert got.tolist() == [3.0, 3.0]


@both
def test_8_embeddings_and_bare_parameters_count_when_named(importance):
    embedding, bare = nn.Embedding(5, 3), nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    nn.init.constant_(embedding.weight, 2.0)
    embedding.weight.grad, bare.grad = torch.ones(5, 3), torch.full((3,), -1.0)
    group = Group().add(embedding, function.prune_embedding_out_channels, range(3))
    group.add(bare, function.prune_parameter_out_channels, range(3))
    types = [nn.Embedding, nn.Parameter]
    taylor = importance.TaylorImportance(group_reduction="sum", normalizer=None, target_types=types)
    assert taylor(group).tolist() == [11.0, 12.0, 13.0]
    hessian = importance.HessianImportance(group_reduction="sum", normalizer=None, target_types=types)
    holder = nn.Module()
    holder.embedding, holder.bare = embedding, bare
    hessian.accumulate_grad(holder)
    assert hessian(group).tolist() == [21.0, 24.0, 29.0]


@both
def test_9_sums_are_float32(importance):
    """255.75 is no bfloat16 number."""
    linear = nn.Linear(1023, 2, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(linear.weight, 0.25)
    linear.weight.grad = torch.ones_like(linear.weight)
    got = importance.TaylorImportance(group_reduction="sum", normalizer=None)(hand_group(linear))
    assert got.dtype == torch.float32
    assert got.tolist() == [255.75, 255.75]


@both
def test_9_a_missing_gradient_says_what_to_do(importance):
    with pytest.raises(UsageError, match=r"Linear \[3, 2\]: expected a gradient in .grad, got None; run loss.backward"):
        importance.TaylorImportance()(hand_group(nn.Linear(2, 3)))
