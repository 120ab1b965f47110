"""Estimates of a run: near what was measured, larger for more work, without weights, and soon there."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import UsageError
from hywia_kernels.arch.facts import weight_bytes
from hywia_kernels.deploy.estimate import STAGES, Estimate, estimate
from hywia_kernels.deploy.rates import H100, Rates, measured_rates
from tests.support.models import random_model, sizes
from tests.support.tiny import TINY, fresh

RECOVERY = hk.Recovery(tokens=98_304, text_tokens=32_768, tune="full", batch=8, hold="live")
ALL = dict(
    writes=True,
    ranks_heads=True,
    layer_samples=32,
    layers_priced=2,
    reconstruct_samples=96,
    recover=RECOVERY,
    trials=3,
    trial_samples=(32, 32),
    rates=H100,
)


@pytest.fixture(scope="module")
def seven():
    """LLaMA-7B's shapes in bfloat16, without memory."""
    with torch.device("meta"):
        return random_model(seed=None, **sizes(32000, 4096, 11008, 32, 32, 32)).bfloat16()


def test_layers_that_are_trained_take_three_forwards_a_pass_and_half_a_one_more(seven):
    def of(passes):
        return estimate(seven, reconstruct_samples=1024, layer_passes=passes, samples=0, ratio=0.5, rates=H100)

    none, one, three = (of(passes) for passes in (0, 1, 3))
    more = [x.seconds["reconstruction"] - none.seconds["reconstruction"] for x in (one, three)]
    assert more[1] / more[0] == pytest.approx((3 * 3 + 0.5) / (3 + 0.5), rel=1e-6)
    layer = sum(p.numel() for p in seven.model.layers[0].parameters())
    held = one.memory_bytes - none.memory_bytes
    # Float32 copies, gradients and two moments, the weights as they were; and a step's activations, 0.77 GB.
    assert held == pytest.approx(18 * layer + 0.77e9, rel=0.1)
    assert three.memory_bytes == one.memory_bytes


def test_a_float32_model_is_trained_at_the_rate_of_bfloat16_where_that_is_faster():
    slow = dataclasses.replace(H100, products=100e9, narrow=None)
    fast = dataclasses.replace(slow, narrow=400e9)
    model, request = fresh(TINY[2]), dataclasses.replace(RECOVERY, held_out=1, checks=1)

    def seconds(rates):
        return estimate(model, samples=0, recover=request, ratio=0.5, rates=rates, device="cpu").seconds["recovery"]

    # The held-out sample is read in float32.
    assert seconds(fast) == pytest.approx(seconds(slow) * (100 * 0.4) / (400 * 0.18), rel=0.02)


def test_what_was_measured_on_an_h100(seven):
    got = estimate(seven, samples=96, seq_len=128, ranks_heads=True, reconstruct_samples=1024, ratio=0.5, rates=H100)
    measured = {"scoring": 1.2, "head ranking": 2.2, "reconstruction": 14.7, "cutting": 0.10}
    assert got.seconds.keys() == measured.keys()
    for stage, seconds in measured.items():
        assert seconds / 3 < got.seconds[stage] < 3 * seconds, (stage, got.seconds[stage])
    assert got.total_seconds == pytest.approx(sum(got.seconds.values()))


def test_a_search_takes_a_short_reconstruction_a_trial(seven):
    usual = {"samples": 0, "ratio": 0.5, "rates": H100}
    one, six = (estimate(seven, trials=n, trial_samples=(32, 32), **usual).seconds["searching"] for n in (1, 6))
    assert 5.5 * one < six < 6.0 * one, "the dense model's pass comes once"
    refit = estimate(seven, reconstruct_samples=32, **usual).seconds["reconstruction"]
    assert refit < one < 3.0 * refit
    masked = estimate(seven, trials=6, trial_samples=(0, 32), **usual)
    assert 0 < masked.seconds["searching"] < six - 5 * refit
    assert masked.memory_bytes < estimate(seven, trials=6, trial_samples=(1024, 32), **usual).memory_bytes


def test_memory_is_the_weights_and_the_stage_that_needs_most(seven):
    bare = estimate(seven, samples=0, rates=H100)
    assert bare.memory_bytes == weight_bytes(seven)
    assert set(bare.seconds) == {"cutting"}
    scored = estimate(seven, samples=10, rates=H100)
    assert 13.5e9 < scored.memory_bytes < 20e9, "the pass over ten samples was measured at 14.7 GB"
    solved = estimate(seven, samples=0, reconstruct_samples=1024, rates=H100)
    # Four hidden states a token, and about as much again for the equations and a chunk.
    assert 4 * 1024 * 128 * 4096 * 2 < solved.memory_bytes - weight_bytes(seven) < 12e9


def test_a_model_without_weights_is_estimated_like_the_model():
    model = fresh(TINY[2])
    with torch.device("meta"):
        bare = type(model)(model.config)
    assert dataclasses.asdict(estimate(bare, **ALL)) == dataclasses.asdict(estimate(model, **ALL))


@pytest.mark.parametrize("stage", STAGES[:6])
def test_more_samples_take_longer(seven, stage):
    counts = (64, 200, 400, 1000)
    sizes = [{"samples": n, "reconstruct_samples": n, "trial_samples": (n, n), "layer_samples": n} for n in counts]
    many = [estimate(seven, **{**ALL, **size}).seconds[stage] for size in sizes]
    assert many == sorted(set(many))
    longer = estimate(seven, **{**ALL, "seq_len": 256}).seconds[stage]
    assert longer > 1.3 * estimate(seven, **ALL).seconds[stage]


def test_more_samples_need_more_memory_until_the_pass_is_a_leaner_one(monkeypatch):
    model = fresh(TINY[1])
    needs = []
    for free in (1 << 40, 50_000_000):
        monkeypatch.setattr("hywia_kernels.deploy.stage_bytes.free_bytes", lambda device, free=free: free)
        needs.append([estimate(model, samples=n, seq_len=128, rates=H100).memory_bytes for n in (8, 64, 512)])
    assert needs[0] == sorted(set(needs[0]))
    assert needs[1][0] == needs[0][0]
    assert needs[1][2] < 0.6 * needs[0][2]


@pytest.mark.parametrize("stage", ["scoring", "cutting"])
def test_seconds_go_with_size(stage):
    """Four times the weights in the layers, twice the layers: eight times the work, but for the embeddings."""
    with torch.device("meta"):
        small = random_model(seed=None, **sizes(512, 512, 1536, 4, 8, 8))
        large = random_model(seed=None, **sizes(512, 1024, 3072, 8, 8, 8))
    ratio = estimate(large, **ALL).seconds[stage] / estimate(small, **ALL).seconds[stage]
    assert 6.0 < ratio < 8.5


def test_layers_that_compete_are_priced(seven):
    """One forward pass ranks layers; each price is two more over sixteen samples, less a layer or two."""
    alone = estimate(seven, samples=0, layer_samples=96, rates=H100).seconds["layer ranking"]
    priced = [estimate(seven, samples=0, layer_samples=96, layers_priced=n, rates=H100) for n in (1, 7)]
    steps = [p.seconds["layer ranking"] - alone for p in priced]
    assert steps[1] == pytest.approx(7 * steps[0])
    assert alone / 6 < steps[0] < alone / 2
    assert "layer ranking" not in estimate(seven, samples=0, rates=H100).seconds


def test_seconds_go_with_the_rates(seven):
    slow = Rates(*(value / 10 for value in dataclasses.astuple(H100)[:4]), launch=10 * H100.launch)
    once, again = estimate(seven, **ALL).seconds, estimate(seven, **{**ALL, "rates": slow}).seconds
    assert again == pytest.approx({stage: 10 * seconds for stage, seconds in once.items()})


def test_the_disk_holds_what_stays():
    model = random_model(**sizes(259, 64, 128, 2, 4, 4))
    assert estimate(model, ratio=0.0, rates=H100).disk_bytes == weight_bytes(model)
    expected = estimate(model, ratio=0.5, rates=H100).disk_bytes
    hk.prune(model, hk.plan(hk.score(model, criterion="random"), group_ratio=0.5, align=1))
    assert expected == weight_bytes(model)


def test_experts():
    with torch.device("meta"):
        fields = sizes(512, 64, 96, 2, 4, 2)
        model = random_model("mixtral", seed=None, **fields, num_local_experts=4, num_experts_per_tok=2)
    got = estimate(model, **ALL)
    assert set(got.seconds) == set(STAGES)
    assert got.memory_bytes > weight_bytes(model)
    assert 0 < got.disk_bytes < weight_bytes(model)


def test_rates_are_measured_soon():
    measured_rates(torch.device("cpu"), torch.float32)
    began = time.process_time()
    got = measured_rates(torch.device("cpu"), torch.float32)
    assert time.process_time() - began < 0.6 * max(torch.get_num_threads(), 1)
    for rate in dataclasses.astuple(got)[:3]:
        assert 1e7 < rate < 1e14
    assert estimate(fresh(TINY[0]), samples=4, seq_len=16).total_seconds > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": -1}, "samples: expected a whole number from 0, got -1"),
        ({"samples": 1.5}, "samples: expected a whole number from 0, got 1.5"),
        ({"seq_len": 1}, "seq_len: expected a whole number from 2, got 1"),
        ({"reconstruct_samples": True}, "reconstruct_samples: expected a whole number"),
        ({"layer_passes": -1}, "layer_passes: expected a whole number from 0, got -1"),
        ({"trials": -1}, "trials: expected a whole number from 0, got -1"),
        ({"trial_samples": (32, 0.5)}, "trial_samples: expected a whole number from 0, got 0.5"),
        ({"ratio": 1.0}, "ratio: expected a number from 0 to below 1, got 1.0"),
        ({"ratio": float("nan")}, "ratio: expected a number from 0 to below 1, got nan"),
    ],
)
def test_arguments_are_judged(gqa, wrong, message):
    with pytest.raises(UsageError, match=message):
        estimate(gqa, rates=H100, **wrong)


def test_an_estimate_cannot_be_changed(gqa):
    got = estimate(gqa, rates=H100)
    assert isinstance(got, Estimate)
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.memory_bytes = 0


def test_a_recovery_takes_longer_with_more_tokens_and_more_weights(seven):
    def seconds(**change):
        return estimate(seven, samples=0, recover=dataclasses.replace(RECOVERY, **change), rates=H100).seconds

    once, twice = seconds(), seconds(tokens=2 * 98_304)
    assert 1.6 * once["recovery"] < twice["recovery"] < 2.0 * once["recovery"], "the checks and the asking come once"
    assert seconds(tune="lora")["recovery"] < once["recovery"]
    assert seconds(text_tokens=2 * 32_768)["recovery text"] > 1.5 * once["recovery text"]
    assert "recovery text" not in seconds(text=("a.txt",))
    live, kept = (
        estimate(seven, samples=0, recover=dataclasses.replace(RECOVERY, hold=hold), rates=H100).memory_bytes
        for hold in ("live", "kept")
    )
    assert live - kept == pytest.approx(weight_bytes(seven), rel=1e-6)
