"""Targets, constraints and the plans made for them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import UsageError
from hywia_kernels.deploy import device_profiles, planning, serving_rules
from hywia_kernels.deploy.cost import cost_of
from hywia_kernels.types import Group, Member
from tests.support.models import random_model, sizes
from tests.support.tiny import TINY, fresh, make_plan


def device(rates, align=4):
    """A target whose products have the same rate in both forms and at both counts of tokens."""
    table = {form: {64: dict(rates), 128: dict(rates)} for form in ("up", "down")}
    return device_profiles.Target("made", "made up", "a test", align, table, 100.0, 10.0)


def test_h100_is_measured_and_its_rule_is_read_from_its_costs():
    target = device_profiles.resolve("h100")
    assert target.measured
    assert "H100" in target.device
    text = (device_profiles._profiles() / "h100.json").read_text()
    costs = {int(a): c for a, c in json.loads(text)["alignment_costs"].items()}
    assert all(costs[target.align] <= c * 1.03 for a, c in costs.items() if a > target.align)
    assert any(costs[target.align // 2] > c * 1.03 for a, c in costs.items() if a >= target.align)
    # LLM-Pruner's odd width costs several times an aligned one.
    assert costs[1] > 3
    assert device_profiles.resolve("h200").tflop_s == target.tflop_s


def test_rates_between_measured_widths_follow_the_time():
    target = device({64: 10.0, 128: 10.0, 192: 5.0})
    assert target.rate("up", 64, 128) == 10.0
    assert target.rate("up", 64, 96) == pytest.approx(10.0)
    # Times, up to a factor: 12.8 at 128, 38.4 at 192, so 25.6 in the middle.
    assert target.rate("up", 64, 160) == pytest.approx(160 / 25.6)
    assert (target.rate("up", 64, 8), target.rate("up", 64, 999)) == (10.0, 5.0)


def test_worthwhile_drops_widths_that_a_wider_one_outruns():
    target = device({64: 10.0, 128: 5.0, 192: 10.0, 256: 10.0})  # times 6.4, 25.6, 19.2, 25.6
    assert target.pareto_widths([64, 128, 192, 256]) == [64, 192, 256]
    unknown = dataclasses.replace(target, tflop_s={})
    assert unknown.pareto_widths([64, 128]) == [64, 128]


@pytest.mark.parametrize(("name", "align"), [("a100", 64), ("cpu", 16), ("auto", None), (None, None)])
def test_devices_that_were_not_measured_say_so(name, align):
    target = device_profiles.resolve(name)
    if align is not None:
        assert (target.align, target.measured) == (align, False)
    elif not torch.cuda.is_available():
        assert target.align == 16


def test_unknown_targets_and_damaged_profiles(tmp_path):
    with pytest.raises(UsageError, match=r"target: expected one of h100, .*got 'tpu9'"):
        device_profiles.resolve("tpu9")
    (tmp_path / "x.json").write_text('{"device": "x"}')
    with pytest.raises(UsageError, match="is no profile"):
        device_profiles.resolve(tmp_path / "x.json")


def test_prediction_of_a_plan(gqa):
    before = cost_of(gqa)
    plan = make_plan(gqa, "both")
    after = cost_of(gqa, plan)
    flat = device_profiles.predict(before, after, device({32: 10.0, 64: 10.0}), context=16)
    products = sum(n * k for n, k in before.matrices) / sum(n * k for n, k in after.matrices)
    assert all(1.0 < s < products for s in flat.prefill.values())
    assert flat.size == before.weight_bytes / after.weight_bytes
    by_flops = device_profiles.predict(before, after, device_profiles.resolve("cpu"))
    assert by_flops.prefill == {2048: before.prefill_flops(1, 2048) / after.prefill_flops(1, 2048)}
    assert by_flops.decode == before.decode_bytes(1, 512) / after.decode_bytes(1, 512)
    hk.prune(gqa, plan)
    assert cost_of(gqa) == after


def test_work_counts_by_hand():
    model = fresh(TINY[3])  # 8 heads and 2 KV heads of 6, hidden 48, 56 channels, 3 layers, untied
    work = cost_of(model)
    layer = 48 * 48 * 2 + 2 * 12 * 48 + 3 * 56 * 48
    assert sum(n * k for n, k in work.matrices) == 3 * layer
    assert (work.attention, work.kv) == ((48,) * 3, (12,) * 3)
    assert work.kv_bytes_per_token == 2 * 3 * 12 * 4
    assert work.parameters == sum(p.numel() for p in model.parameters())
    assert work.step_bytes == 4 * (work.parameters - 259 * 48)
    assert work.prefill_flops(2, 10) == 2 * 20 * 3 * layer + 2 * 2 * 259 * 48 + 2 * 2 * 100 * 3 * 48
    assert work.decode_bytes(3, 7) == work.step_bytes + 3 * 7 * work.kv_bytes_per_token


def attention(units, per_unit, size=8):
    members = (
        Member("q", 0, per_unit * size),
        Member("k", 0, size),
        Member("v", 0, size),
        Member("o", 1, per_unit * size),
    )
    return Group("l.attention", "attention", 0, units, "kv_group", members, 1)


def test_rules_of_servers():
    named = ("llama.cpp.blocks", "llama.cpp.k_quants")
    rules = {c.name: c for c in serving_rules.constraints((*serving_rules.SERVERS, *named), 4)}
    group = attention(8, 2)
    admitted = {name: [u for u in range(1, 9) if c.admits(group, u)] for name, c in rules.items()}
    assert admitted["vllm.heads"] == [2, 4, 6, 8]
    assert admitted["vllm.kv_heads"] == [1, 2, 4, 8]  # multiples of 4, and what divides it
    assert admitted["tgi.kv_heads"] == [4, 8]
    assert not any(name.startswith("llama.cpp.h") for name in rules), "KV heads always divide query heads"
    assert admitted["llama.cpp.k_quants"] == []  # 16 entries a unit: none of 8 units makes 256
    assert admitted["llama.cpp.blocks"] == [2, 4, 6, 8]
    assert rules["llama.cpp.blocks"].says.endswith("or llama.cpp's quantiser refuses Q4_0 and Q8_0")
    assert admitted["vllm.width"] == list(range(1, 9))
    limited = serving_rules.allowed(tuple(rules.values()))
    assert limited(group, list(range(1, 9))) == [8], "the present width is no cut"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(serve=("ollama",)), r"serve: expected some of vllm, tgi, llama\.cpp, .*got 'ollama'"),
        (dict(tensor_parallel=0), "tensor_parallel: expected at least 1, got 0"),
    ],
)
def test_unknown_servers(call, message):
    with pytest.raises(UsageError, match=message):
        serving_rules.constraints(**call)


@pytest.fixture
def scores():
    return hk.score(fresh(TINY[0]), criterion="random", seed=5)  # 6 heads, 56 channels


def test_binding_constraints_are_named(scores):
    free = planning.plan_for(scores, group_ratio=0.4, align=4)
    assert (free.widths("attention"), free.record["binding"]) == ([4, 4, 4], [])
    bound = planning.plan_for(scores, group_ratio=0.4, align=4, serve=("tgi",), tensor_parallel=3)
    assert bound.widths("attention") == [3, 3, 3]
    assert bound.widths("mlp") == [36, 36, 36]
    assert bound.record["binding"] == ["tgi.heads", "tgi.kv_heads", "tgi.width"]
    assert bound.record["constraints"][0] == "tgi.heads: query heads are a multiple of 3"


def test_the_target_decides_the_alignment_unless_the_caller_does(scores):
    staircase = device({8: 8.0, 24: 12.0, 32: 8.0, 40: 20.0, 56: 20.0}, align=8)
    plan = planning.plan_for(scores, target=staircase, group_ratio=0.45, units=("mlp",))
    assert plan.widths("mlp") == [40, 40, 40]  # 32 is nearer, and slower than 40
    assert plan.record["target"] == "made up"
    assert (
        planning.plan_for(scores, target=staircase, group_ratio=0.45, units=("mlp",), align=4).widths("mlp") == [32] * 3
    )


def test_a_ratio_that_good_widths_miss_takes_any_aligned_one(scores):
    staircase = device({8: 0.1, 16: 0.1, 24: 0.1, 32: 0.1, 40: 0.1, 48: 0.1, 56: 50.0}, align=8)
    plan = planning.plan_for(scores, target=staircase, ratio=0.2, units=("mlp",))
    assert plan.widths("mlp")[0] < 56


def test_prediction_is_recorded(scores):
    model = fresh(TINY[0])
    plan = planning.plan_for(scores, target="cpu", ratio=0.3, align=4)
    told = planning.with_prediction(plan, model, "cpu").record["prediction"]
    assert told["target"] == "cpu (not measured: by FLOPs)"
    assert told["decode"] > 1.1
    assert told["size"] == round(cost_of(model).weight_bytes / cost_of(model, plan).weight_bytes, 4)


def blocky(hidden=64, channels=128):
    """Scores of a model whose hidden size is a multiple of 32, or not; heads of 16 in two KV groups of two."""
    torch.manual_seed(0)
    model = random_model(**sizes(97, hidden, channels, 2, 4, 2), head_dim=16)
    return hk.score(model, criterion="random", seed=5)


def test_whole_blocks_are_a_wish_of_llama_cpp():
    def widths(scores, **request):
        plan = planning.plan_for(scores, target="cpu", units=("mlp",), **request)
        return plan.widths("mlp"), [text.partition(":")[0] for text in plan.record["constraints"]]

    assert widths(blocky(), group_ratio=0.375) == ([96, 96], ["llama.cpp.blocks"])  # 80 is as near
    assert widths(blocky(), group_ratio=0.375, serve=("vllm",)) == ([80, 80], [])
    assert widths(blocky(), group_ratio=0.375, align=16) == ([80, 80], []), "the caller's own alignment comes first"
    assert widths(blocky(hidden=48), group_ratio=0.375) == ([80, 80], []), "rows of 48 are no blocks as it is"
    narrow = blocky(channels=24)  # no multiple of 32 is below: the wish is dropped, and the rule by name is not
    assert widths(narrow, ratio=0.08) == ([16, 16], [])
    with pytest.raises(UsageError, match=r"cannot be reached .*llama\.cpp\.blocks leave fewer widths"):
        widths(narrow, ratio=0.08, serve=("llama.cpp.blocks",))


def test_families_whose_heads_vllm_guesses_have_a_note():
    """As vLLM 0.23.0 refuses them, tried on its CPU engine (`benchmarks/test_vllm.py`)."""
    for family in serving_rules.VLLM_GUESSES_HEADS:
        assert f"of {family} from the number" in (serving_rules.heads_note(("vllm",), family, True) or "")
        assert serving_rules.heads_note(("vllm",), family, False) is None
        assert serving_rules.heads_note(("llama.cpp",), family, True) is None
    assert serving_rules.heads_note(("vllm",), "qwen3", True) is None
    model = random_model("qwen2", **sizes(97, 48, 64, 2, 4, 2))
    scores = hk.score(model, criterion="random", seed=5)
    for units, noted in ((("attention",), True), (("mlp",), False)):
        plan = planning.plan_for(scores, group_ratio=0.5, units=units, target="cpu")
        assert ("note" in planning.with_prediction(plan, model, target="cpu").record) == noted
