"""The HTML page of a record: what comes first, without matplotlib, and records that somebody damaged."""

from __future__ import annotations

import copy
import json
import re
import sys

import pytest
import torch
from test_speed import parsed

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint import run_record
from hywia_kernels.cli import html_report, main
from tests.support.tiny import TINY, fresh

READING = {
    "mode": "eager",
    "phase": "decode",
    "batch": 1,
    "context": 8,
    "ms": 1.5,
    "tokens_per_second": 700.0,
    "speedup": 1.25,
    "ideal": None,
    "peak_bytes": None,
}


@pytest.fixture(scope="module")
def record():
    model = fresh(TINY[2])
    scores = hk.score(model, torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1)))
    plan = hk.plan(scores, group_ratio=0.4, align=4)
    from hywia_kernels.checkpoint.saving import plan_record

    return json.loads(
        json.dumps(
            {
                "versions": {"python": "3"},
                "arguments": {"model": "some/base", "argv": ["prune", "some/base", "-o", "a b"], "prompt": "Tell\nme"},
                "scores_summary": run_record.score_summary(scores, plan),
                "plan": plan_record(plan),
                "history": [
                    {"parameters_before": 10 * plan.parameters_before, "parameters_after": plan.parameters_before}
                ],
                "evaluation": {
                    "before": {"perplexity": 20.0, "parameters": 10, "continuation": "all"},
                    "after": {"perplexity": 30.0, "parameters": 5},
                },
                "bench": {
                    "device": "A device",
                    "models": [
                        {
                            "model": "m",
                            "parameters": 1,
                            "weight_bytes": 2,
                            "kv_bytes_per_token": 3,
                            "figures": [READING],
                        }
                    ],
                },
            }
        )
    )


def test_widths_are_drawn_where_layers_differ(record):
    record = copy.deepcopy(record)
    widths = record["plan"]["widths"]["mlp"]
    assert "units in each layer" not in html_report.page(record, "out")
    record["plan"]["widths"]["mlp"] = [widths[0] - 4, *widths[1:]]
    page = html_report.page(record, "out")
    assert "mlp: units in each layer" in page
    assert "attention: units in each layer" not in page


def test_a_recovery_is_told_above(record):
    done = {"kept": True, "divergences": [[0, 0.5], [8, 0.25]], "tune": "lora", "steps": 8}
    page = html_report.page({**record, "recovery": done}, "out")
    assert "Then it was recovered: trained (lora) in 8 steps" in page
    assert "0.500 to 0.250" in page
    assert page.index("0.500 to 0.250") < page.index("Before and after")


def test_what_a_reader_wants_comes_first(record):
    page = html_report.page(record, "out")
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads == ["Before and after", "Widths by layer", "Scores", "Speed", "How it was made", "Versions"]
    assert re.search(r"perplexity</th><td>20\.00</td><td>30\.00</td><td>1\.500</td>", page)
    total = 10 * record["plan"]["parameters_before"]
    assert f"2 cuts in a row took {total - record['plan']['parameters_after']:,} of\n{total:,} parameters" in page
    assert "hywia prune some/base -o &#39;a b&#39;" in page
    assert parsed(page).count("svg") == 4 + 1  # scores and losses by kind; speed
    assert "The model before the cut continues <q>Tell me</q>:" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)


def test_without_matplotlib_the_page_has_its_tables_and_says_so(record, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = html_report.page(record, "out")
    assert "svg" not in parsed(page)
    assert "pip install &#39;hywia_kernels[report]&#39;" in page
    assert "<td>30.00</td>" in page
    assert f"<td>{run_record.spans(record['plan']['widths']['mlp'])}</td>" in page


def test_a_plot_is_refused_before_the_work_where_nothing_can_draw_it(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "model", "--plot", "b.svg"]) == 1
    shown = capsys.readouterr()
    assert "pip install 'hywia_kernels[report]'" in shown.err
    assert "loading" not in shown.out


def test_everything_shown_is_escaped(record):
    evil = "<script>x</script>&\"'\x1b\ud800"
    bad = json.loads(json.dumps(record))
    bad["arguments"] = {"model": evil, "argv": [evil]}
    bad["versions"] = {evil: evil}
    bad["plan"]["layout"] = evil
    bad["plan"]["widths"][evil] = [1, 2, 3]
    bad["plan"]["prediction"] = {"target": evil, "prefill": {evil: 1.0}, "decode": 1.0, "size": 1.0}
    bad["scores_summary"][0]["kind"] = evil
    bad["evaluation"] |= {"device": evil, "text": {"name": evil}}
    bad["evaluation"]["after"]["continuation"] = evil
    bad["bench"] = {**bad["bench"], "device": evil}
    bad["bench"]["models"] = [{**bad["bench"]["models"][0], "model": evil}]
    page = html_report.page(bad, evil)
    page.encode("utf-8")
    assert "svg" in parsed(page)  # and no script
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;x") > 12


BROKEN = {
    "no models": lambda r: r["bench"].pop("models"),
    "a model that is a number": lambda r: r["bench"].update(models=[7]),
    "a reading without a time": lambda r: r["bench"]["models"][0]["figures"][0].pop("ms"),
    "a time that is a word": lambda r: r["bench"]["models"][0]["figures"][0].update(ms="fast"),
    "a prediction that is a list": lambda r: r["plan"].update(prediction={"prefill": [1]}),
    "a number beyond floats": lambda r: r["evaluation"]["after"].update(perplexity=10**400),
}


@pytest.mark.parametrize("how", BROKEN)
def test_damaged_figures_are_an_error_and_no_traceback(record, how):
    broken = json.loads(json.dumps(record))
    BROKEN[how](broken)
    with pytest.raises(HywiaError, match=r"hywia\.json is damaged"):
        html_report.page(broken, "out")


@pytest.mark.parametrize(
    "part",
    [{"plan": 7}, {"plan": {"widths": 3}}, {"plan": {"widths": {"mlp": [None]}}}, {"scores_summary": {"a": 1}},
     {"scores_summary": [3, {"kind": "mlp"}]}, {"evaluation": "good"}, {"versions": None},
     {"arguments": [], "history": "x"},
     {"plan": {"parameters_before": 0, "parameters_after": 0}}],
)  # fmt: skip
def test_parts_of_another_shape_are_left_out(record, part):
    page = html_report.page({**record, **part}, "out")
    assert "<h2>How it was made</h2>" in page
    parsed(page)


def test_widths_before_come_from_the_plan_or_the_scores(record):
    both = run_record.kind_widths(record)
    assert [(k.kind, k.before) for k in both] == [("attention", [3, 3, 3]), ("mlp", [56, 56, 56])]
    older = {**record, "plan": {k: v for k, v in record["plan"].items() if k != "widths_before"}}
    assert run_record.kind_widths(older) == both
    assert [k.before for k in run_record.kind_widths({**older, "scores_summary": None})] == [None, None]


def test_the_text_that_was_measured_is_named_by_its_digest():
    text = {
        "name": "some/dir/words.txt",
        "sha256": "ab12",
        "blocks": 1040,
        "block": 128,
        "tokens": 133120,
        "bos": False,
    }
    said = run_record.evaluation_text({"evaluation": {"text": text}})
    assert said == "words.txt, SHA-256 ab12, 1,040 blocks of 128 tokens"
