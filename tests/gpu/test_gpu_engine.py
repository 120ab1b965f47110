"""The calibration engine on a CUDA device: modes, memory, reproducibility."""

from __future__ import annotations

import copy
import os
import threading

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.engine import rotary
from hywia_kernels.engine.memory import free_bytes
from tests.support.comparison import ORDERS, distance
from tests.support.models import random_model, sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def model():
    built = random_model(**sizes(2048, 512, 1408, layers=4, heads=8, kv_heads=4), initializer_range=0.05)
    return built.to("cuda", torch.bfloat16)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 2048, (6, 640), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["fast", "lean", "layerwise"])
def test_modes_agree_with_the_reference_pass(model, tokens, mode, monkeypatch):
    monkeypatch.setattr("hywia_kernels.engine.memory.CHUNK_TOKENS", 1280)
    fused = hk.calibrate(model, tokens, engine="fused", memory=mode)
    plain = hk.calibrate(model, tokens, engine="autograd")
    assert (fused.record["memory"], fused.record["runs"]) == (mode, 3 if mode == "layerwise" else 1)
    # Other numbers of rows, other products of cuBLAS: layerwise parts from the reference by bfloat16's own noise.
    assert distance(fused, plain) <= (4e-2 if mode == "layerwise" else 1e-2)


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_same_bits_every_run(model, tokens, mode):
    """640 tokens a sample: attention's backward takes more than one block of keys, whose sums are atomic by default."""
    one, two = (hk.calibrate(model, tokens, engine="fused", memory=mode) for _ in range(2))
    assert one.record["reproducible"]
    assert all(torch.equal(one.coarse[n], two.coarse[n]) for n in one.coarse)
    assert all(torch.equal(one.fine[n][o], two.fine[n][o]) for n in one.fine for o in ORDERS)


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_same_bits_every_run_where_attention_is_written_out_in_products(model, tokens, mode):
    """These need none of torch's deterministic kernels, and so not cuBLAS's workspace in the environment either."""
    model.set_attn_implementation("eager")
    try:
        seen = dict(os.environ)
        one, two = (hk.calibrate(model, tokens, engine="fused", memory=mode) for _ in range(2))
    finally:
        model.set_attn_implementation("sdpa")
    assert one.record["reproducible"]
    assert dict(os.environ) == seen
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(torch.equal(one.coarse[n], two.coarse[n]) for n in one.coarse)
    assert all(torch.equal(one.fine[n][o], two.fine[n][o]) for n in one.fine for o in ORDERS)


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_the_rotation_is_replaced_while_a_pass_runs(model, tokens, mode, monkeypatch):
    """Where torch's flash kernel does not serve, as in float32, the model's own attention calls it."""
    from transformers.models.llama import modeling_llama

    calls, original = [], rotary.rotated
    monkeypatch.setattr(rotary, "rotated", lambda function: counted(original(function), calls))
    before = modeling_llama.apply_rotary_pos_emb
    hk.calibrate(copy.deepcopy(model).float(), tokens[:2, :64], engine="fused", memory=mode)
    assert len(calls) >= model.config.num_hidden_layers
    assert modeling_llama.apply_rotary_pos_emb is before


def counted(function, calls):
    def call(*arguments, **keywords):
        calls.append(1)
        return function(*arguments, **keywords)

    return call


def test_refit_and_leftover_do_not_see_tf32(model, tokens):
    from hywia_kernels.method.head_residual import head_residuals

    whole = copy.deepcopy(model).float()
    want = head_residuals(whole, tokens[:, :64])
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        got = head_residuals(whole, tokens[:, :64])
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_offloaded_layer_inputs_give_the_same_bits(model, tokens, monkeypatch):
    from hywia_kernels.engine import layered, memory

    monkeypatch.setattr(memory, "CHUNK_TOKENS", 1280)
    here = hk.calibrate(model, tokens, memory="layerwise")
    original, kept, held = layered.run, layered.kept_on, []

    def offloaded(model, layers, chunks, scorer, scale, offload, kept_layers=0):
        assert offload is False
        return original(model, layers, chunks, scorer, scale, True, kept_layers)

    def noted(hidden, offload):
        held.append(kept(hidden, offload))
        return held[-1]

    monkeypatch.setattr(layered, "run", offloaded)
    monkeypatch.setattr(layered, "kept_on", noted)
    there = hk.calibrate(model, tokens, memory="layerwise")
    assert len(held) == model.config.num_hidden_layers * 3  # a run of samples each
    assert all(hidden.is_pinned() for hidden in held)
    assert all(torch.equal(here.coarse[n], there.coarse[n]) for n in here.coarse)
    assert all(torch.equal(here.fine[n][o], there.fine[n][o]) for n in here.fine for o in ORDERS)


MODES = {
    "autocast": lambda: torch.autocast("cuda", dtype=torch.float16),
    "inference mode": torch.inference_mode,
    "a default device": lambda: torch.device("cuda"),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_callers_modes_change_nothing(model, tokens, mode):
    want = hk.calibrate(model, tokens, engine="fused", memory="fast")
    with MODES[mode]():
        got = hk.calibrate(model, tokens, engine="fused", memory="fast")
    assert all(torch.equal(want.coarse[n], got.coarse[n]) for n in want.coarse)
    assert all(torch.equal(want.fine[n][o], got.fine[n][o]) for n in want.fine for o in ORDERS)


def test_two_threads_on_streams_of_their_own(model, tokens):
    """Passes take turns, each on the stream that is current in its thread, and neither disturbs the other."""
    want = hk.calibrate(model, tokens, engine="fused")
    others = copy.deepcopy(model)
    got: dict[int, hk.Statistics] = {}

    def run(number, own):
        with torch.cuda.stream(torch.cuda.Stream()):
            got[number] = hk.calibrate(own, tokens, engine="fused")

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(i, own)) for i, own in enumerate((model, others))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [0, 1]
    for found in got.values():
        assert all(torch.equal(want.coarse[n], found.coarse[n]) for n in want.coarse)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("samples", ["equal", "ragged"])
def test_second_order_alone_is_that_of_all(model, tokens, samples):
    """By a kernel of its own, which makes the signed sums from the gradients and not from what the weights made."""
    text = tokens if samples == "equal" else [tokens[0, :600], tokens[1, :400], tokens[2, :630]]
    every = hk.calibrate(model, text, engine="fused")
    one, two = (hk.calibrate(model, text, engine="fused", orders=("second",)) for _ in range(2))
    for name, coarse in every.coarse.items():
        assert set(one.fine[name]) == {"second"}
        assert torch.equal(one.fine[name]["second"], two.fine[name]["second"])
        assert torch.equal(one.coarse[name], two.coarse[name])
        want = every.fine[name]["second"].double()
        assert float(((one.fine[name]["second"] - want).abs() / want.clamp(min=1e-30)).max()) <= 2e-5
        assert float((one.coarse[name] - coarse).abs().max() / coarse.abs().max()) <= 1e-2


def test_the_estimate_covers_the_peak(model, tokens):
    weights = torch.cuda.memory_allocated()
    for mode in ("fast", "lean"):
        record = hk.calibrate(model, tokens, engine="fused", memory=mode).record
        assert record["peak_bytes"] - weights <= 1.15 * record["estimate_bytes"]


def test_ragged_samples(model, tokens):
    samples = [tokens[0, :600], tokens[1, :400], tokens[2, :630]]
    assert distance(hk.calibrate(model, samples), hk.calibrate(model, samples, engine="autograd")) <= 1e-2


def test_a_limit_of_the_process_is_what_is_free():
    device = torch.device("cuda")
    total = torch.cuda.mem_get_info(device)[1]
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + (2 << 30)) / total)
        free = free_bytes(device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    assert free == pytest.approx((2 << 30) + unused, abs=1 << 20)
    assert free_bytes(device) > free
