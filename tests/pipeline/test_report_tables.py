"""Tables of figures before and after, warnings of extreme cuts, and names of devices."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.checkpoint import run_record
from hywia_kernels.checkpoint.metrics import METRICS, compare, figures_of
from hywia_kernels.cli import console
from hywia_kernels.deploy import hardware
from tests.support.tiny import TINY, fresh


def test_widths_by_layer_in_words():
    assert run_record.spans([1536] * 3) == "1,536"
    assert run_record.spans([1536, 1536, 0, 768, 1536]) == "1,536 x2, 768, 1,536"


def test_every_metric_is_compared_and_named_once():
    before = {"parameters": 2000, "bytes": 8000, "perplexity": 10.0, "tokens_per_second": 50.0}
    after = {"parameters": 1000, "bytes": 4000, "perplexity": 12.5, "tokens_per_second": 75.0}
    rows = compare(before, after)
    assert [r.metric.key for r in rows] == list(before)
    assert [r.ratio for r in rows] == ["0.500", "0.500", "1.250", "1.500"]
    assert [(r.before, r.after) for r in rows][:3] == [("2,000", "1,000"), ("8,000", "4,000"), ("10.00", "12.50")]
    assert [(m.name, v) for m, v in figures_of(after)][3] == ("eager tokens/s", "75.0")
    assert rows[3].metric.detail == "tokens a second (greedy, one sequence)"
    assert len({m.name for m in METRICS}) == len({m.detail for m in METRICS}) == len(METRICS)


@pytest.mark.parametrize(
    ("old", "new", "ratio"),
    [(0, 5, "-"), (math.inf, math.inf, "-"), (2.0, math.inf, "-"), (math.nan, 1.0, "-"), (4, 1, "0.250")],
)
def test_ratios_that_do_not_exist(old, new, ratio):
    assert [r.ratio for r in compare({"perplexity": old}, {"perplexity": new})] == [ratio]


def test_missing_and_odd_values_are_left_out():
    assert compare({"perplexity": "many", "bytes": True}, {"perplexity": 1.0, "bytes": 2, "parameters": 3}) == []
    assert figures_of({"parameters": None, "bytes": 7}) == [(METRICS[1], "7")]


def test_the_console_prints_the_same_table(capsys):
    text = {"text": {"name": "words.txt", "sha256": "5f" * 32, "blocks": 4, "block": 16, "tokens": 64, "bos": False}}
    before, after = {"parameters": 10, "perplexity": 2.0, **text}, {"parameters": 5, "perplexity": 3.0, **text}
    console.print_comparison(before, {**after, "continuation": "a\x1b[31m\nb"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["parameters", "10", "5", "0.500"],
        ["perplexity", "2.00", "3.00", "1.500"],
    ]
    assert lines[3:] == ["perplexity on 4 blocks of 16 tokens: words.txt", "after continues: a\ufffd[31m b"]


def kept(shares):
    """A plan of a tiny model that keeps so many units of each group: kind -> counts by layer."""
    model = fresh(TINY[2])
    scores = hk.score(model, criterion="random", seed=1)
    plan = hk.plan(scores, group_ratio=0.5, units=("mlp",), align=1)
    keep = dict(plan.keep)
    for kind, counts in shares.items():
        groups = sorted((g for g in plan.groups if g.kind == kind), key=lambda g: g.layer)
        keep |= {g.name: torch.arange(count) for g, count in zip(groups, counts, strict=True)}
    return replanned(plan, plan.groups, keep)


def replanned(plan, groups, keep):
    """The plan with other groups and kept units, and the number of parameters that these leave."""
    removed = sum((g.units - keep[g.name].numel()) * g.unit_parameters for g in groups)
    return dataclasses.replace(plan, groups=groups, keep=keep, parameters_after=plan.parameters_before - removed)


def test_a_cut_of_more_than_three_quarters_is_called_extreme(capsys):
    assert console.extreme_cuts(kept({"mlp": (14, 14, 14)})) == []  # exactly 75 % of 56 go
    one = console.extreme_cuts(kept({"mlp": (56, 13, 9)}))
    assert len(one) == 1
    assert one[0].startswith("mlp: up to 84 % of the channels go in 2 of 3 layers;")
    assert "Lower --ratio" in one[0]
    plan = kept({"mlp": (1, 1, 1), "attention": (3, 3, 3)})
    assert console.extreme_cuts(plan)[0].startswith("mlp: up to 98 % of the channels go in every layer;")
    console.print_plan(plan)
    assert "  warning: mlp: up to 98 % of the channels go in every layer" in capsys.readouterr().out


def test_each_kind_has_a_sentence_of_its_own():
    plan = kept({"mlp": (1, 56, 56)})
    attention = next(g for g in plan.groups if g.kind == "attention")
    finer = dataclasses.replace(attention, units=30, unit_parameters=attention.unit_parameters // 10)
    groups = tuple(finer if g is attention else g for g in plan.groups)
    plan = replanned(plan, groups, {**plan.keep, attention.name: torch.arange(3)})
    sentences = console.extreme_cuts(plan)
    assert [s.split(" go in ")[0] for s in sentences] == [
        "attention: up to 90 % of the kv groups",
        "mlp: up to 98 % of the channels",
    ]


def test_one_name_of_a_device_for_the_command_and_the_benchmarks():
    from benchmarks import environment

    assert environment.device_name is hardware.device_name
    name = hardware.device_name(torch.device("cpu"))
    assert name == hardware.device_name("cpu") != ""
    threads = torch.get_num_threads()
    assert hardware.threaded_device_name("cpu") == f"{name}, {threads} thread{'' if threads == 1 else 's'}"
