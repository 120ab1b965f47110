"""What cannot be reached is refused before anything is measured, and servers' rules hold for what is not cut too."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.cli import main
from hywia_kernels.cli.arguments import group_ratio
from hywia_kernels.deploy import planning, serving_rules
from hywia_kernels.types import Group, Member
from tests.support.tiny import TINY, Tiny, fresh

SMALL = ("--samples", "4", "--seq-len", "16", "--no-eval")


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    """A model on disk, and a world in which nothing may be measured or written by it."""
    monkeypatch.chdir(tmp_path)
    for name in ("measuring.calibration", "measuring.calibrate", "measuring.score", "deciding.head_residuals"):
        monkeypatch.setattr(
            f"hywia_kernels.compression.{name}", lambda *a, **k: pytest.fail("measured before the refusal")
        )
    return tmp_path


@pytest.mark.parametrize("criterion", ["hywia", "magnitude"])
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (["--ratio", "0.99"], "ratio: 0.99 cannot be reached to within one step"),
        (["--ratio", "0.99"], "the largest is 0."),
        (["--ratio", "0.6", "--units", "attention"], "ratio: 0.6 cannot be reached"),
        (["--ratio", "0.3", "--units", "mlp", "--align", "64"], "the widest MLP has 56 channels, so none can be cut"),
        (["--group-ratio", "mlp=0.01"], "group_ratio: 0.01 rounds to nothing"),
        (["--group-ratio", "mlp=0.5,attention=0.01"], "group_ratio: 0.01 rounds to nothing"),
        (["--group-ratio", "0.5", "--layers", "1:9"], "layers: expected FIRST:END with 0 <= FIRST < END <= 3, got 1:9"),
        (["--group-ratio", "0.5", "--units", "experts"], "units: the model has no experts to cut, only mlp, attention"),
        (["--group-ratio", "experts=0.5"], "units: the model has no experts to cut, only mlp, attention"),
        (["--group-ratio", "mlp=0.5", "--serve", "vllm", "--tensor-parallel", "2"], "serve: vllm.kv_heads"),
        (["--ratio", "0.2", "--serve", "vllm", "--tensor-parallel", "7"], "vllm pads the vocabulary of 259 to 320"),
    ],
)
def test_refused_before_anything_is_measured(here, capsys, request_, message, criterion):
    more = ["--criterion", criterion] if criterion != "hywia" else []
    assert main(["prune", "model", "-o", "out", *request_, *SMALL, *more]) == (1 if "vllm.kv_heads" in message else 2)
    assert message in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("mpl=0.5", "got 'mpl'; did you mean 'mlp'?"),
        ("MLP=0.5", "group_ratio: expected some of mlp, attention, experts, layers, got 'MLP'"),
        ("atention=0.5,mlp=0.5", "did you mean 'attention'?"),
        ("expert=0.5", "did you mean 'experts'?"),
        ("mlp=0.5,mlp=0.6", "expected each kind once, got mlp twice"),
        ("", "expected 0.5 or mlp=0.6,attention=0.34, got ''"),
        ("mlp=", "expected 0.5 or"),
        ("=0.5", "expected KIND=SHARE"),
        ("mlp=0.5,", "expected KIND=SHARE"),
        ("mlp=0.5=0.6", "expected 0.5 or"),
        ("mlp=nan", "group_ratio: expected a number between 0 and 1, both excluded, got nan"),
        ("nan", "group_ratio: expected a number between 0 and 1, both excluded, got nan"),
        ("mlp=inf", "group_ratio: expected a number between 0 and 1"),
        ("mlp=1.5", "group_ratio: expected a number between 0 and 1"),
        ("mlp=0", "group_ratio: expected a number between 0 and 1"),
    ],
)
def test_shares_by_kind_are_refused_before_a_model_is_loaded(here, capsys, share, message, monkeypatch):
    monkeypatch.setattr("hywia_kernels.cli.session.load", lambda *a, **k: pytest.fail("loaded before the refusal"))
    try:
        code = main(["prune", "model", "-o", "out", f"--group-ratio={share}", *SMALL])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_shares_are_read():
    assert group_ratio(" 0.5") == 0.5
    assert group_ratio("mlp=0.6, attention = 0.34") == {"mlp": 0.6, "attention": 0.34}


def test_the_largest_reachable_ratio_is_reachable(gqa):
    with pytest.raises(UsageError, match=r"the largest is (0\.\d+)") as refused:
        planning.check_reachable(gqa, ratio=0.99, align=8)
    largest = float(str(refused.value).partition("the largest is ")[2][:6])
    assert hk.plan(hk.score(gqa, criterion="random"), ratio=largest, align=8).ratio == pytest.approx(largest, abs=1e-4)


@pytest.mark.parametrize("request_", [dict(ratio=0.2), dict(group_ratio=0.5), dict(group_ratio=0.4, layout="adaptive")])
def test_what_can_be_planned_passes(gqa, request_):
    plan = planning.check_reachable(gqa, align=4, **request_)
    prunable = sum(g.units * g.unit_parameters for g in plan.groups) / plan.parameters_before
    wanted = request_.get("ratio") or prunable * request_["group_ratio"]
    assert plan.ratio == pytest.approx(wanted, abs=0.06)


def test_adaptive_without_an_estimate_of_the_loss_is_refused_by_name(gqa):
    with pytest.raises(UsageError, match="criterion 'random' does not"):
        planning.check_reachable(gqa, criterion="random", group_ratio=0.5, align=4, layout="adaptive")


def test_widths_that_differ_already_are_told_before_too(gqa):
    scores = hk.score(gqa, criterion="random")
    hk.prune(gqa, hk.plan(scores, group_ratio=0.5, layers=(1, 3), units=("mlp",), align=4))
    with pytest.raises(HywiaError, match="widths differ already"):
        planning.check_reachable(gqa, ratio=0.1)


@pytest.fixture
def scores(gqa):
    return hk.score(gqa, criterion="random", seed=5)  # 6 heads on 3 KV heads, 56 channels


def test_rules_that_cannot_bind_are_none():
    assert serving_rules.constraints(("vllm", "tgi"), 1) == ()
    assert [(r.name, r.wish) for r in serving_rules.constraints(("llama.cpp",), 8)] == [("llama.cpp.blocks", True)]
    assert [r.name for r in serving_rules.constraints(("vllm",), 2)] == ["vllm.heads", "vllm.kv_heads", "vllm.width"]


@pytest.mark.parametrize("request_", [dict(group_ratio=0.4), dict(ratio=0.25), dict(group_ratio={"attention": 0.01})])
@pytest.mark.parametrize("layout", ["uniform", "adaptive"])
def test_a_cut_meets_rules_that_the_model_breaks(scores, request_, layout):
    scores = dataclasses.replace(scores, loss=scores.values)
    plan = planning.plan_for(scores, serve=("vllm",), tensor_parallel=2, align=4, layout=layout, **request_)
    assert set(plan.widths("attention")) <= {1, 2}
    assert all(w % 2 == 0 for w in plan.widths("mlp"))
    forced = isinstance(request_.get("group_ratio"), dict)  # otherwise two heads would have stayed anyway
    assert plan.record["binding"] == (["vllm.kv_heads"] if forced else [])


@pytest.mark.parametrize(
    "request_",
    [
        dict(group_ratio={"mlp": 0.5}),
        dict(ratio=0.2, units=("mlp",)),
        dict(group_ratio=0.5, layers=(1, 3)),
    ],
)
def test_what_is_not_cut_and_breaks_a_rule_is_refused(scores, request_):
    said = (
        r"vllm\.kv_heads \(KV heads are a multiple of 2, or divide it\), but model\.layers\.0\.attention keeps its 3 KV"
    )
    with pytest.raises(HywiaError, match=said):
        planning.plan_for(scores, serve=("vllm",), tensor_parallel=2, align=4, **request_)
    heads = ("vllm.heads", "vllm.kv_heads")
    assert planning.plan_for(scores, serve=heads, tensor_parallel=3, align=4, **request_).widths("attention")[0] == 3


def test_no_width_that_meets_a_rule(scores):
    with pytest.raises(HywiaError, match=r"tgi\.kv_heads .*cannot meet with at most 3 KV heads and 6 query heads"):
        planning.plan_for(scores, serve=("tgi",), tensor_parallel=4, align=4, group_ratio=0.4)


def test_rules_of_quantisers_do_not_hold_for_what_is_not_cut(scores):
    plan = planning.plan_for(scores, serve=("llama.cpp.blocks",), align=8, group_ratio={"mlp": 0.4})
    assert (plan.widths("mlp"), plan.widths("attention")) == ([32] * 3, [3] * 3)
    assert plan.record["binding"] == []


def test_a_ratio_that_rules_put_out_of_reach_names_them(scores):
    heads = ("tgi.heads", "tgi.kv_heads")
    with pytest.raises(UsageError, match=r"cannot be reached.* reach nothing.*; tgi\.heads, tgi\.kv_heads leave fewer"):
        planning.plan_for(scores, serve=heads, tensor_parallel=3, units=("attention",), ratio=0.1)
    assert planning.plan_for(scores, units=("attention",), ratio=0.1).widths("attention") == [2] * 3


def test_adaptive_widths_start_from_the_widest_admitted():
    model = fresh(Tiny("odd", heads=4, kv_heads=4, tied=True, hidden=32, intermediate=57))
    scores = hk.score(model, criterion="random")
    scores = dataclasses.replace(scores, loss=scores.values)
    plan = planning.plan_for(
        scores, serve=("tgi",), tensor_parallel=2, align=1, group_ratio={"mlp": 0.2}, layout="adaptive"
    )
    assert all(w % 2 == 0 and w < 57 for w in plan.widths("mlp"))
    assert sum(plan.widths("mlp")) == pytest.approx(3 * 57 * 0.8, abs=3)


@pytest.mark.parametrize(
    ("vocabulary", "parallel", "fits"), [(300, 5, True), (300, 7, False), (32000, 8, True), (65, 3, False)]
)
def test_vocabularies_are_padded_and_shared_out(vocabulary, parallel, fits):
    assert serving_rules.check_vocabulary(("tgi", "llama.cpp"), parallel, vocabulary) is None
    if fits:
        assert serving_rules.check_vocabulary(("vllm",), parallel, vocabulary) is None
    else:
        with pytest.raises(UsageError, match=f"no multiple of {parallel} GPUs"):
            serving_rules.check_vocabulary(("vllm",), parallel, vocabulary)


def test_groups_of_experts_have_no_rule_on_heads():
    member = Member("gate", 0, 1)
    experts = Group("l.experts", "experts", 0, 5, "expert", (member, member), 1)
    rules = serving_rules.constraints(("vllm", "tgi"), 2)
    assert serving_rules.check_untouched(rules, (experts,), lambda group: False) is None


def test_mha_and_gqa_both_count_query_heads():
    for tiny, parallel in ((TINY[0], 4), (TINY[3], 3)):
        scores = hk.score(fresh(tiny), criterion="random")
        with pytest.raises(HywiaError, match=r"vllm\.heads \(query heads are a multiple of"):
            planning.plan_for(scores, serve=("vllm",), tensor_parallel=parallel, group_ratio={"mlp": 0.5}, align=4)


def test_nothing_is_drawn_from_the_scores(gqa):
    """The early refusal and the plan's own are the same, whatever the scores."""
    for seed in range(3):
        scores = hk.score(gqa, criterion="random", seed=seed)
        for ratio in torch.linspace(0.02, 0.9, 12).tolist():
            outcomes = []
            for call in (
                lambda r=ratio: planning.check_reachable(gqa, ratio=r, align=8),
                lambda s=scores, r=ratio: planning.plan_for(s, ratio=r, align=8),
            ):
                try:
                    call()
                    outcomes.append(None)
                except UsageError as refused:
                    outcomes.append(str(refused))
            assert outcomes[0] == outcomes[1]
