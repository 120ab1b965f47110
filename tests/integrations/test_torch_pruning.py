"""Our scorers against the installed Torch-Pruning's: the same numbers, but for the differences that are listed.

`test_torch_pruning_versions` runs this file again with the oldest supported version.
"""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Concatenated, Convolutions, Flattened, FusedGate, Group, llama
from torch import nn

tp = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")

import hywia_kernels as hk  # noqa: E402
from hywia_kernels import UsageError  # noqa: E402
from hywia_kernels.integrations import torch_pruning as ours  # noqa: E402
from hywia_kernels.integrations.measured import measured  # noqa: E402

theirs = tp.importance
function = tp.pruner.function
Pruner = getattr(tp.pruner, "BasePruner", tp.pruner.MetaPruner)
REDUCTIONS = ("sum", "mean", "max", "prod", "first", "gate", None)
NORMALIZERS = (None, "sum", "standarization", "mean", "max", "gaussian", "sentinel_0.5", "lamp", torch.sqrt)
SUBTRACTING = ("standarization", "gaussian", "lamp")  # differences of near numbers: rounding is a larger part of them
CRITERIA = ("MagnitudeImportance", "TaylorImportance", "HessianImportance")

# Upstream must fail these; a pass would be news.
both = pytest.mark.parametrize(
    "importance",
    [pytest.param(theirs, marks=pytest.mark.xfail(strict=True, reason="Torch-Pruning's defect")), ours],
    ids=["theirs", "ours"],
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    ours.clear_fisher()


class Collector:
    def __init__(self):
        self.groups = []

    def __call__(self, group):
        self.groups.append(group)
        return torch.ones(len(group[0].idxs))  # 1.5 cannot do without


def heads_of(model):
    config, heads = model.config, {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
    return heads


def pruner_of(model, importance, **options):
    """The language-model flow: heads, MLP channels and hidden dimensions."""
    return Pruner(
        model,
        torch.arange(16).view(2, 8),
        importance=importance,
        global_pruning=False,
        pruning_ratio=0.5,
        num_heads=heads_of(model),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        ignored_layers=[model.lm_head],
        output_transform=lambda out: out.logits,
        out_channel_groups={},
        in_channel_groups={},
        **options,
    )


def groups_of(model, inputs=None):
    if hasattr(model, "lm_head"):
        collector = Collector()
        list(pruner_of(model, collector).step(interactive=True))
        return collector.groups
    graph = tp.DependencyGraph().build_dependency(model, inputs)
    return list(graph.get_all_groups())


def backward(model, inputs):
    model.zero_grad()
    if hasattr(model, "lm_head"):
        model(inputs, labels=inputs).loss.backward()
    else:
        model(inputs).square().mean().backward()


def made(name):
    """`(model, inputs, groups)`, gradients in place."""
    if name.startswith("llama"):
        model, inputs = llama(8 if name == "llama" else 2), torch.randint(96, (3, 12))
    else:
        model = {
            "convolutions": lambda: Convolutions(normalised=False),
            "normalised": Convolutions,
            "concatenated": Concatenated,
            "fused": FusedGate,
            "flattened": Flattened,
        }[name]().eval()
        inputs = torch.randn(4, 8) if name == "fused" else torch.randn(4, 3, 8, 8)
    groups = groups_of(model, inputs)
    backward(model, inputs)
    return model, inputs, groups


def accumulated(scorer, model, inputs, samples=1):
    """One sample is enough for upstream, which keeps the last one only."""
    scorer.zero_grad()
    for sample in inputs[:samples]:
        backward(model, sample[None])
        scorer.accumulate_grad(model)


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
            pristine = copy.copy([list(item.idxs) for item in group])
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


@pytest.mark.parametrize("name", ["normalised", "fused", "flattened", "llama-gqa"])
def test_compat_is_upstream_bit_for_bit(name):
    model, inputs, groups = made(name)
    count = 0
    for criterion in CRITERIA:
        options = [{"group_reduction": r, "normalizer": n} for r in ("mean", "max", "prod") for n in ("mean", None)]
        for option in options:
            mine = getattr(ours, criterion)(**option, upstream_compat=True)
            upstream = getattr(theirs, criterion)(**option)
            for scorer, kept in ((mine, []), (upstream, [])):
                if criterion == "HessianImportance":
                    accumulated(scorer, model, inputs, samples=3)
                kept += [scorer(group) for group in groups]
                scorer.kept = kept
            for a, b in zip(mine.kept, upstream.kept, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
                count += 1
    assert count == len(CRITERIA) * 6 * len(groups)


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


# The differences, in the order in which the module lists them.


def hand_group(linear, **roots):
    return Group().add(linear, function.prune_linear_out_channels, range(linear.out_features), **roots)


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


# Odd groups, and what is kept between them.


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


def test_every_weight_is_read_once_a_step():
    model, inputs, groups = made("llama")
    scorer = ours.TaylorImportance()
    first = [scorer(g) for g in groups]
    matrices = 2 * 7 + 1  # every one of the decoder's in two groups, and the head
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


def test_what_data_hides_is_seen_after_clear():
    linear = nn.Linear(2, 3)
    scorer = ours.MagnitudeImportance(normalizer=None)
    before = scorer(hand_group(linear))
    linear.weight.data.mul_(2.0)
    torch.testing.assert_close(scorer(hand_group(linear)), before)
    scorer.clear()
    torch.testing.assert_close(scorer(hand_group(linear)), 4.0 * before)


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
    with pytest.raises(UsageError, match="fusion: expected one of attention, fine"):
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
