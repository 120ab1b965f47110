"""LLM-Pruner's contract, over a stand-in for its repository, or the real one where HYWIA_LLM_PRUNER names a checkout.

With the real one every listed difference is shown twice: upstream must fail what ours passes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hywia_kernels import UsageError
from hywia_kernels.integrations.measured import clear_fisher
from tests.support.nets import llama

REPOSITORY = os.environ.get("HYWIA_LLM_PRUNER", "")
STAND_IN = Path(__file__).with_name("stand_in")
DEFECT = pytest.param("theirs", marks=pytest.mark.xfail(strict=True, reason="LLM-Pruner's defect"))
both = pytest.mark.parametrize("side", ["ours", DEFECT] if REPOSITORY else ["ours"])
TAYLORS = ("vectorize", "param_first", "param_second", "param_mix")
HEAD = 8


@pytest.fixture(scope="module")
def tool():
    """`(our module, LLM-Pruner's torch_pruning, its hf_llama_pruner)`; they go when this file is done."""
    mine = "hywia_kernels.integrations.llm_pruner"
    assert not any(name.partition(".")[0] == "LLMPruner" for name in sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(REPOSITORY).resolve() if REPOSITORY else STAND_IN))
        sys.modules.pop(mine, None)
        import LLMPruner.torch_pruning as tp
        from LLMPruner.pruner import hf_llama_pruner

        from hywia_kernels.integrations import llm_pruner

        yield llm_pruner, tp, hf_llama_pruner
    for name in [n for n in sys.modules if n.partition(".")[0] == "LLMPruner"] + [mine]:
        sys.modules.pop(name)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    clear_fisher()


def member(module, handler, idxs):
    return SimpleNamespace(target=SimpleNamespace(module=module), handler=handler), list(idxs)


def kept(scores, consecutive_groups, ratio):
    """What LLM-Pruner's pruner makes of scores: added up over a head, the lowest removed."""
    if consecutive_groups > 1:
        scores = scores.view(-1, consecutive_groups).sum(1)
    return sorted(scores.argsort()[int(len(scores) * ratio) :].tolist())


def importance_of(tool, side):
    return tool[0] if side == "ours" else tool[2]


def filled(model, samples):
    """`.grad` of the batch and `.acc_grad`, sample by sample, as LLM-Pruner's script leaves them."""
    for sample in samples:
        model.zero_grad()
        model(sample[None], labels=sample[None]).loss.backward()
        for parameter in model.parameters():
            square = parameter.grad**2 / len(samples)
            parameter.acc_grad = square + getattr(parameter, "acc_grad", 0)
    model.zero_grad()
    model(samples, labels=samples).loss.backward()


def emptied(model):
    model.zero_grad()
    for parameter in model.parameters():
        parameter.__dict__.pop("acc_grad", None)


def attention(tp, layer, root="q_proj"):
    part, out, into = layer.self_attn, tp.prune_linear_out_channels, tp.prune_linear_in_channels
    order = [root, *(n for n in ("q_proj", "k_proj", "v_proj") if n != root)]
    group = [member(m := getattr(part, n), out, range(m.out_features)) for n in order]
    return [*group, member(part.o_proj, into, range(part.o_proj.in_features))]


def mlp(tp, layer):
    part, width = layer.mlp, range(layer.mlp.gate_proj.out_features)
    group = [member(m, tp.prune_linear_out_channels, width) for m in (part.gate_proj, part.up_proj)]
    return [*group, member(part.down_proj, tp.prune_linear_in_channels, width)]


def plain(weight, axis, taylor):
    """The published formulas, in float64."""
    w, g = weight.detach().double(), weight.grad.double()
    if taylor == "vectorize":
        return (w * g).sum(1 - axis).abs()
    second = w * weight.acc_grad.double() * w if taylor != "param_first" else 0.0
    term = {"param_first": w * g, "param_second": second, "param_mix": w * g - 0.5 * second}[taylor]
    return term.abs().sum(1 - axis)


def plain_rows(tp, group, taylor):
    return [
        plain(dep.target.module.weight, 1 if dep.handler == tp.prune_linear_in_channels else 0, taylor)
        for dep, _ in group
    ]


def close(got, want, bound=2e-6):
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    return bool((got.double() - want).abs().max() <= bound * want.abs().max())


@pytest.mark.parametrize("taylor", TAYLORS)
def test_the_four_criteria(tool, taylor):
    llm_pruner, tp, _ = tool
    model, samples = llama(8), torch.randint(96, (3, 12))
    filled(model, samples)
    for layer in model.model.layers:
        for group in (attention(tp, layer), mlp(tp, layer)):
            rows = torch.stack(plain_rows(tp, group, taylor))
            reductions = {
                "sum": rows.sum(0),
                "mean": rows.mean(0),
                "max": rows.amax(0),
                "prod": rows.prod(0),
                "first": rows[0],
                "second": rows[1],
                None: rows,
            }
            for reduction, want in reductions.items():
                scorer = llm_pruner.TaylorImportance(reduction, taylor=taylor)
                assert close(scorer(group, ch_groups=1, consecutive_groups=HEAD), want), reduction


@pytest.mark.parametrize("taylor", TAYLORS)
def test_one_pass_instead_of_the_loop(tool, taylor):
    """`accumulate_fisher` gives the same scores and kept heads, and leaves nothing on parameters."""
    llm_pruner, tp, _ = tool
    model, samples = llama(2), torch.randint(96, (3, 12))
    filled(model, samples)
    scorer = llm_pruner.TaylorImportance(taylor=taylor)
    groups = [g for layer in model.model.layers for g in (attention(tp, layer, "k_proj"), mlp(tp, layer))]
    loop = [scorer(g, ch_groups=1, consecutive_groups=HEAD if i % 2 == 0 else 1) for i, g in enumerate(groups)]
    emptied(model)
    llm_pruner.accumulate_fisher(model, samples, axes="units")
    assert not any(hasattr(p, "acc_grad") or p.grad is not None for p in model.parameters())
    for i, group in enumerate(groups):
        head = HEAD if i % 2 == 0 else 1
        assert close(scorer(group, ch_groups=1, consecutive_groups=head), loop[i].double(), 5e-6)


def grouped_query(tp):
    """Two KV heads, four query heads each: KV head 0 is the one that matters, unless its queries are given away."""
    torch.manual_seed(3)
    layer = llama(2, layers=1).model.layers[0]
    weights = [getattr(layer.self_attn, n).weight for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    with torch.no_grad():
        for weight in weights:
            weight.fill_(0.1)
        weights[0][HEAD : 2 * HEAD] = 5.0  # query head 1: KV head 0's own, credited by upstream to KV head 1
    return attention(tp, layer, "k_proj"), weights


@both
def test_1_query_heads_count_towards_their_own_kv_head(tool, side):
    group, (query, key, value, output) = grouped_query(tool[1])
    got = importance_of(tool, side).TaylorImportance(taylor="param_first")(group, ch_groups=1, consecutive_groups=HEAD)
    rows = [plain(w, a, "param_first") for w, a in ((query, 0), (key, 0), (value, 0), (output, 1))]
    want = rows[1] + rows[2]
    want = want + sum(r.view(2, 4, HEAD).sum(1).flatten() for r in (rows[0], rows[3]))
    assert kept(got, HEAD, 0.5) == [0]
    assert close(got, want)


@both
def test_2_key_heads_under_a_query_root_share(tool, side):
    group, (query, key, value, output) = grouped_query(tool[1])
    group = [group[1], group[0], *group[2:]]  # the query first
    scorer = importance_of(tool, side).TaylorImportance(taylor="param_first")
    got = scorer(group, ch_groups=1, consecutive_groups=HEAD)
    rows = [plain(w, a, "param_first") for w, a in ((query, 0), (key, 0), (value, 0), (output, 1))]
    shared = ((rows[1] + rows[2]) / 4).view(2, 1, HEAD).expand(2, 4, HEAD).flatten()
    assert close(got, rows[0] + rows[3] + shared)


def test_2_heads_of_unknown_size(tool):
    llm_pruner, tp, _ = tool
    group, _ = grouped_query(tp)
    named = llm_pruner.TaylorImportance(taylor="param_first", head_dim=HEAD)(group)
    assert torch.equal(named, llm_pruner.TaylorImportance(taylor="param_first")(group, consecutive_groups=HEAD))
    with pytest.raises(UsageError, match=r"got one of 64 with heads of None; pass consecutive_groups or head_dim"):
        llm_pruner.TaylorImportance(taylor="param_first")(group)


@both
@pytest.mark.parametrize("taylor", TAYLORS[1:])
def test_3_a_whole_attention_as_one_member(tool, side, taylor):
    model, samples = llama(8), torch.randint(96, (2, 12))
    filled(model, samples)
    part = model.model.layers[0].self_attn
    group = [member(part, tool[2].hf_attention_pruner.prune_out_channels, range(64))]
    want = plain(part.o_proj.weight, 0, taylor)
    want = want + sum(plain(getattr(part, n).weight, 1, taylor) for n in ("q_proj", "k_proj", "v_proj"))
    assert close(importance_of(tool, side).TaylorImportance(taylor=taylor)(group), want)


@both
@pytest.mark.parametrize("taylor", ["vectorize", "param_first"])
def test_4_indices_are_followed_and_left_alone(tool, side, taylor):
    _, tp, upstream = tool
    linear, norm = nn.Linear(2, 4, bias=False), nn.LayerNorm(4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]))
    linear.weight.grad, norm.weight.grad = torch.ones(4, 2), torch.tensor([10.0, -20, 30, 40])
    group = [
        member(linear, tp.prune_linear_out_channels, [3, 1]),
        member(norm, upstream.hf_rmsnorm_pruner.prune_out_channels, [3, 1]),
    ]
    assert importance_of(tool, side).TaylorImportance(taylor=taylor)(group).tolist() == [44.0, 22.0]
    assert [idxs for _, idxs in group] == [[3, 1], [3, 1]]


@both
@pytest.mark.parametrize(("p", "want"), [(1, 10.0), (2, 20.0), (3, 40.0)])
def test_5_embeddings_are_summed_over_their_entries(tool, side, p, want):
    embedding = nn.Embedding(5, 3)
    nn.init.constant_(embedding.weight, -2.0)
    group = [member(embedding, tool[1].prune_embedding_out_channels, range(3))]
    assert importance_of(tool, side).MagnitudeImportance(p=p)(group).tolist() == [want] * 3


@both
def test_6_float16_terms_do_not_vanish(tool, side):
    """w²·F of 1e-8 is no float16 number."""
    linear = nn.Linear(4, 2, bias=False, dtype=torch.float16)
    nn.init.constant_(linear.weight, 0.01)
    linear.weight.grad = torch.zeros_like(linear.weight)  # upstream wants one here as well
    linear.weight.acc_grad = torch.full_like(linear.weight, 1e-4)
    group = [member(linear, tool[1].prune_linear_out_channels, range(2))]
    got = importance_of(tool, side).TaylorImportance(taylor="param_second")(group)
    want = (linear.weight.detach().double() ** 2 * linear.weight.acc_grad.double()).sum(1)
    assert float(want[0]) == pytest.approx(4e-8, rel=1e-2)
    assert close(got, want)


@both
def test_7_errors_say_what_to_do(tool, side):
    importance, tp = importance_of(tool, side), tool[1]
    group = [member(nn.Linear(2, 3), tp.prune_linear_out_channels, range(3))]
    with pytest.raises(UsageError, match="taylor: expected one of vectorize, param_first, .* got 'params'"):
        importance.TaylorImportance(taylor="params")
    with pytest.raises(UsageError, match=r"expected a gradient in .grad, got None; run loss.backward\(\)"):
        importance.TaylorImportance(taylor="param_first")(group)
    with pytest.raises(UsageError, match=r"expected squares of gradients in .acc_grad, got none; call accumulate_fish"):
        importance.TaylorImportance(taylor="param_mix")(group)
    with pytest.raises(UsageError, match="group_reduction: expected one of"):
        importance.MagnitudeImportance(group_reduction="median")


def test_embeddings_in_taylor_and_whole_attentions_in_vectorize(tool):
    llm_pruner, tp, upstream = tool
    embedding = nn.Embedding(5, 3)
    nn.init.constant_(embedding.weight, -2.0)
    embedding.weight.grad = torch.ones(5, 3)
    group = [member(embedding, tp.prune_embedding_out_channels, range(3))]
    assert llm_pruner.TaylorImportance(taylor="vectorize")(group).tolist() == [10.0] * 3
    part = llama(8).model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(part, name).weight.grad = torch.randn(64, 64)
    group = [member(part, upstream.hf_attention_pruner.prune_out_channels, range(64))]
    want = plain(part.o_proj.weight, 0, "vectorize")
    want = want + sum(plain(getattr(part, n).weight, 1, "vectorize") for n in ("q_proj", "k_proj", "v_proj"))
    assert close(llm_pruner.TaylorImportance(taylor="vectorize")(group), want)


def test_the_normaliser_takes_two_arguments(tool):
    llm_pruner, tp, _ = tool
    linear = nn.Linear(2, 3)
    group = [member(linear, tp.prune_linear_out_channels, range(3))]
    seen = []

    def normalizer(given, scores):
        seen.append(given)
        return scores / scores.max()

    got = llm_pruner.MagnitudeImportance(normalizer=normalizer)(group, ch_groups=1, consecutive_groups=1)
    assert float(got.max()) == 1.0
    assert seen == [group]


def test_compat_is_the_other_class(tool):
    llm_pruner, tp, upstream = tool
    group, _ = grouped_query(tp)
    mine = llm_pruner.TaylorImportance(taylor="param_first", upstream_compat=True)
    assert isinstance(mine, upstream.TaylorImportance)
    assert torch.equal(mine(group), upstream.TaylorImportance(taylor="param_first")(group))
    assert llm_pruner.hf_rmsnorm_pruner is upstream.hf_rmsnorm_pruner


def test_members_that_are_not_scored(tool):
    llm_pruner, _, _ = tool
    group = [member(object(), lambda layer, idxs: layer, range(3))]
    assert llm_pruner.MagnitudeImportance()(group) is None


@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_hywia_scores_heads_and_channels(tool, order):
    import hywia_kernels as hk

    llm_pruner, tp, _ = tool
    model, samples = llama(8), torch.randint(96, (3, 12))
    llm_pruner.accumulate_fisher(model, samples, axes="units")
    own = hk.score(model, samples, fusion="attention", order=order)
    scorer = llm_pruner.HyWIAImportance(order=order)
    for i, layer in enumerate(model.model.layers):
        got = scorer(attention(tp, layer), ch_groups=1, consecutive_groups=HEAD).view(8, HEAD)
        assert torch.equal(got, got[:, :1].expand(8, HEAD))
        torch.testing.assert_close(got[:, 0], own.values[f"model.layers.{i}.attention"], rtol=1e-4, atol=1e-4)
        channels = scorer(mlp(tp, layer))
        torch.testing.assert_close(channels, own.values[f"model.layers.{i}.mlp"], rtol=1e-4, atol=1e-4)


def test_hywia_from_gradients(tool):
    llm_pruner, tp, _ = tool
    linear = nn.Linear(1, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0], [-2], [3], [4]]))
    linear.weight.grad = torch.ones(4, 1)
    group = [member(linear, tp.prune_linear_out_channels, range(4))]
    coarse = llm_pruner.HyWIAImportance("coarse", order="first")(group, ch_groups=1, consecutive_groups=2)
    assert coarse.tolist() == [1.0, 1.0, 7.0, 7.0]
    assert llm_pruner.HyWIAImportance("fine", order="first")(group).tolist() == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(UsageError, match="before scoring with 'second', got none"):
        llm_pruner.HyWIAImportance()(group)
    with pytest.raises(UsageError, match="order: expected one of"):
        llm_pruner.HyWIAImportance(order="third")
