"""The runners end to end at sizes that take seconds; their figures' arithmetic, not their speed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import hywia_kernels as hk

from . import agreement, bench_engine, bench_linear, harness, memory, models, rows, timing
from .cases import LinearCase

CPU = torch.device("cpu")
TINY = LinearCase(24, 16, 1, "all", dtype=torch.float32, samples=3, length=8, group_size=4)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Ceilings from little memory, one thread."""
    monkeypatch.setattr(timing, "GIB", 2**20)
    monkeypatch.setattr(timing.Timer, "matmul_rate", lambda timer: 0.5)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # work this small only waits for more
    yield
    torch.set_num_threads(threads)


def run_linear(prepare, *arguments):
    argv = ["--device", "cpu", "--backends", "reference", "--runs", "2", "--no-compile", *map(str, arguments)]
    return harness.main("linear_importance", "", "benchmarks.bench_linear", {"cpu": ([TINY], [TINY])}, prepare, argv)


def test_linear_figures(tmp_path):
    path = tmp_path / "results.csv"
    assert run_linear(bench_linear.prepare, "--csv", path) == 0
    by_name = {row["implementation"]: row for row in rows.read(path)}
    assert list(by_name) == ["mm alone", "eager", "reference"]
    for row in by_name.values():
        us = float(row["work_us"])
        assert (row["flops"], row["baseline"]) == (str(2 * 24 * 24 * 16), "mm alone")
        assert float(row["tflop_s"]) == pytest.approx(2 * 24 * 24 * 16 / us / 1e6, rel=1e-3)
        assert float(row["share_of_baseline"]) == pytest.approx(float(by_name["mm alone"]["work_us"]) / us, rel=1e-3)
        assert float(row["share_of_matmul"]) == pytest.approx(float(row["tflop_s"]) / 0.5, rel=1e-3)
        assert row["speedup_over_compile"] == ""
    assert by_name["mm alone"]["share_of_baseline"] == "1"


@pytest.mark.parametrize(
    "case",
    [TINY, replace(TINY, axis=0), replace(TINY, order="first", per_sample=False), replace(TINY, order="second")],
    ids=lambda case: case.name,
)
def test_the_torch_candidates_equal_the_reference(case, monkeypatch):
    monkeypatch.setattr(bench_linear, "CHUNK", 100)  # a few units at a time
    tensors = bench_linear.operands(case, CPU)
    plain = (*tensors, case.samples, case.axis, case.order, case.group_size)
    expected = bench_linear.reference(case, tensors)
    for function in (bench_linear.eager, bench_linear.batched) if case.per_sample else (bench_linear.merged,):
        fine, coarse = function(*plain)
        assert fine.shape == expected[0].shape
        assert coarse.shape == expected[1].shape
        assert bench_linear.largest_error((fine, coarse), expected) < 1e-6
    product = tensors[0].t() @ tensors[1]
    assert bench_linear.product_error(product, tensors) < 1e-6
    product[3, 5] += 0.01 * product.abs().max()
    assert bench_linear.product_error(product, tensors) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_signed_sums_from_what_is_mapped_are_those_of_the_gradients(axis):
    case = replace(TINY, axis=axis, mapped=True)
    tensors = bench_linear.operands(case, CPU)
    got = bench_linear.from_mapped(case, tensors, bench_linear.mapped_of(case, tensors))
    _, coarse, scale = bench_linear.reference(case, tensors)
    assert float(((got - coarse).abs() / scale).max()) < 1e-5


def test_two_samples_taken_for_each_other_fail_the_gate(tmp_path):
    def prepare(case, device, backends):
        job = bench_linear.prepare(case, device, backends)

        def call():
            fine, coarse = job.candidates[-1].call()
            return fine, coarse.flip(0)

        return replace(job, candidates=[*job.candidates, harness.Candidate("flipped", call)])

    path = tmp_path / "out.json"
    assert run_linear(prepare, "--json", path) == 1
    record = json.loads(path.read_text())
    assert [figure["implementation"] for figure in record["figures"]] == ["mm alone", "eager", "reference"]
    assert len(record["failures"]) == 1
    assert "flipped: WRONG" in record["failures"][0]


def test_engine_figures(tmp_path, capsys):
    path = tmp_path / "engine.csv"
    argv = ["--device", "cpu", "--shape", "tiny", "--samples", "2", "3", "--length", "8", "--runs", "2"]
    assert bench_engine.main([*argv, "--batch", "2", "--csv", str(path), "--json", str(tmp_path / "e.json")]) == 0
    assert "of random weights" in capsys.readouterr().out
    by_flow = {(row["flow"], row["samples"]): row for row in rows.read(path)}
    smallest = ["plain", "param_first", "param_mix", "fast", "lean", "auto", "fast-second", "lean-second"]
    assert list(by_flow) == [*((f, "2") for f in smallest), *((f, "3") for f in ("plain", "auto", "auto-second"))]
    parameters = 2 * 256 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 176 + 2 * 64) + 64
    for (_, samples), row in by_flow.items():
        seconds, floor = float(row["seconds"]), float(by_flow["plain", samples]["seconds"])
        assert row["weight_bytes"] == str(4 * parameters)
        assert float(row["ratio_to_plain"]) == pytest.approx(seconds / floor, rel=1e-3)
        assert float(row["seconds_per_sample"]) == pytest.approx(seconds / int(samples), rel=1e-3)
        assert (row["weights"], row["runs"], row["layers"], row["length"]) == ("random", "2", "2", "8")
    flows = ("plain", "fast", "lean", "fast-second")
    assert [by_flow[flow, "2"]["memory"] for flow in flows] == ["", "fast", "lean", "fast"]
    assert json.loads((tmp_path / "e.json").read_text())["failures"] == []


def test_planned():
    assert bench_engine.planned([128, 10], ["auto", "param_mix@10", "plain@128"]) == [
        ("param_mix", 10),
        ("auto", 10),
        ("plain", 128),
        ("auto", 128),
    ]
    with pytest.raises(SystemExit):
        bench_engine.main(["--only", "fastest"])


def test_plain_in_parts_leaves_the_gradient_of_the_mean_loss():
    model = models.build("tiny", None, "float32", CPU)
    tokens = models.token_ids(model, 3, 8, CPU)
    bench_engine.plain(model, tokens, 3)
    whole = [p.grad for p in model.parameters()]
    bench_engine.plain(model, tokens, 2)
    for parameter, want in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-6)


def test_a_flow_that_fails_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    def score(model, tokens, taylor):
        raise torch.cuda.OutOfMemoryError("no room\nfor details")

    monkeypatch.setattr(bench_engine.llm_pruner, "score", score)
    argv = ["--device", "cpu", "--shape", "tiny", "--samples", "2", "--length", "8", "--runs", "2", "--no-check"]
    assert bench_engine.main([*argv, "--only", "param_mix", "plain", "--csv", str(tmp_path / "e.csv")]) == 1
    assert [row["flow"] for row in rows.read(tmp_path / "e.csv")] == ["plain"]
    assert "param_mix@2: OutOfMemoryError: no room\n" in capsys.readouterr().out


def test_agreement_finds_what_differs():
    model = models.build("tiny", None, "float32", CPU)
    want = hk.calibrate(model, models.token_ids(model, 3, 8, CPU))
    same = agreement.compare(want, want)
    assert same == agreement.Agreement(0.0, 0.0, {0.2: 1.0, 0.5: 1.0})
    assert same.within(1e-5)
    name = want.groups[1].name
    fine = {n: dict(by) for n, by in want.fine.items()}
    fine[name]["second"] = fine[name]["second"] * 1.01
    coarse = {**want.coarse, name: want.coarse[name].flip(2)}
    off = agreement.compare(replace(want, fine=fine, coarse=coarse), want)
    assert off.fine == pytest.approx(0.01, rel=1e-3)
    assert off.coarse > 0.1
    assert off.kept[0.5] < 1
    assert not off.within(1e-2)
    fine[name]["second"] = fine[name]["second"] * float("nan")
    assert not agreement._error(fine[name]["second"], want.fine[name]["second"]) <= 1


def test_random_model_has_the_rotary_frequencies_and_norms_of_a_loaded_one():
    from transformers import LlamaForCausalLM

    model = models.build("tiny", 1, "bfloat16", CPU)
    usual = LlamaForCausalLM(model.config)
    assert torch.equal(model.model.rotary_emb.inv_freq, usual.model.rotary_emb.inv_freq)
    assert len(model.model.layers) == 1
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(bool((p == 1).all()) for n, p in model.named_parameters() if "norm" in n)
    assert float(model.model.layers[0].mlp.up_proj.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)


def test_peak_of_the_resident_set():
    memory.free(CPU)
    base = memory.resident()
    peak = memory.Peak(CPU, base)
    if peak.bytes() is None:
        pytest.skip("the kernel does not reset VmHWM")
    torch.ones(2**24)  # 64 MiB, freed at once
    assert 60 * 2**20 < peak.bytes() < 80 * 2**20
