"""The reduction since the original, of a model that was cut before."""

from __future__ import annotations

import json
import warnings

import pytest
from tiny import TINY, fresh, make_plan

import hywia_kernels as hk
from hywia_kernels import report
from hywia_kernels.checkpoint import run_record
from hywia_kernels.checkpoint.history import history
from hywia_kernels.types.record import sealed


@pytest.fixture
def first(tmp_path):
    """A model that was cut once, on disk, and a plan for it."""
    model = fresh(TINY[2])
    plan = make_plan(model, "mlp")
    hk.prune(model, plan)
    hk.save(model, None, tmp_path / "one", plan=plan, record={"arguments": {"model": "some/base"}})
    return tmp_path / "one", plan, model


def test_the_total_counts_from_the_original(first, tmp_path, capsys):
    folder, plan, model = first
    second = make_plan(model, "attention")
    steps = history(folder, second)
    assert steps == [
        {
            "base": "some/base",
            "parameters_before": plan.parameters_before,
            "parameters_after": plan.parameters_after,
            "ratio": plan.ratio,
        }
    ]
    report.print_history(steps, second)
    gone = plan.parameters_before - second.parameters_after
    share = 100 * gone / plan.parameters_before
    assert capsys.readouterr().out == (
        f"  since the original: {gone:,} of {plan.parameters_before:,} parameters, {share:.3f} %, in 2 cuts\n"
    )
    hk.prune(model, second)
    hk.save(model, None, tmp_path / "two", plan=second, record={"history": steps})
    third = make_plan(model, "mlp")
    three = history(tmp_path / "two", third)
    assert three[:1] == steps
    assert [s["parameters_after"] for s in three] == [plan.parameters_after, second.parameters_after]
    cut, total = run_record.reduction(json.loads((tmp_path / "two" / "hywia.json").read_text()))
    assert (cut.before, total.before, total.after) == (
        second.parameters_before,
        plan.parameters_before,
        second.parameters_after,
    )
    card = (tmp_path / "two" / "README.md").read_text()
    assert (
        f"Since the original model, 2 cuts in a row removed {gone:,} of {plan.parameters_before:,} parameters" in card
    )


def test_a_model_that_was_never_cut_has_no_history(tmp_path, capsys):
    model = fresh(TINY[2])
    plan = make_plan(model, "mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (None, "", tmp_path, tmp_path / "absent", "no/such-model", "a b?", "./x", "deep/er/path", "x\0y"):
            assert history(source, plan) == []
        hk.save(model, None, tmp_path / "whole")
        assert history(tmp_path / "whole", plan) == []
    report.print_history([], plan)
    assert capsys.readouterr().out == ""


def _parameters(record, value):
    record["plan"]["parameters_after"] = value


@pytest.mark.parametrize(
    "change",
    [
        lambda record: _parameters(record, record["plan"]["parameters_after"] - 1),  # not the model that is cut now
        lambda record: record.update(history=[{"parameters_before": 5, "parameters_after": 4}]),  # does not lead here
        lambda record: record.update(history=[{"parameters_before": 4, "parameters_after": 5}]),  # grew
        lambda record: record.update(history="long"),
        lambda record: record.update(history=[7]),
    ],
)
def test_a_record_of_another_model_is_not_believed(first, change):
    folder, _, model = first
    record = json.loads((folder / "hywia.json").read_text())
    change(record)
    (folder / "hywia.json").write_text(json.dumps(sealed(record)))
    with pytest.warns(
        UserWarning, match=r"the reduction since the original is unknown: .*hywia\.json does not lead to"
    ):
        assert history(folder, make_plan(model, "attention")) == []


def test_a_damaged_record_is_said(first):
    folder, _, model = first
    record = json.loads((folder / "hywia.json").read_text())
    record["plan"]["parameters_after"] -= 1  # by an editor, which seals nothing
    for text in ("{", json.dumps(record)):
        (folder / "hywia.json").write_text(text)
        with pytest.warns(UserWarning, match="the reduction since the original is unknown: .* is damaged: "):
            assert history(folder, make_plan(model, "attention")) == []
