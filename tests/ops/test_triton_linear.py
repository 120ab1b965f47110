"""What is the Triton `linear_importance`'s alone: the cut of its work, its workspace, and its tuned configurations."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch

from hywia_kernels import ops
from hywia_kernels.ops import reference
from hywia_kernels.ops.calls import LinearCall
from tests.support.operands import generator, need

pytest.importorskip("triton")

from hywia_kernels.ops import linear_configs as configs
from hywia_kernels.ops import linear_cut, triton_linear
from hywia_kernels.ops.linear_configs import Config

LLAMA_7B = [(4096, 4096), (11008, 4096), (4096, 11008)]
ORDERS = ("first", "second", "mixed", "all")
TINY = Config(16, 16, 16, 4, 2, group=3)


def equal(samples, length):
    return list(range(0, samples * length + 1, length))


def operands(shape, tokens, device, seed=0):
    sizes = ((tokens, shape[0]), (tokens, shape[1]), shape)
    return tuple(torch.randn(size, generator=generator(seed + i)).to(device) for i, size in enumerate(sizes))


def run(device_operands, offsets, axis, order, **options):
    """The result, which has to be the reference's within float32 rounding."""
    got = ops.linear_importance(*device_operands, samples=offsets, axis=axis, order=order, backend="triton", **options)
    call = {"group_size": 1, "per_sample": True, "scale": 1.0, **options}
    fine, coarse = reference.linear_importance_fp64(*device_operands, offsets, axis, order, **call)
    assert ((got.fine - fine).abs() / fine).max().item() < 2e-5
    assert ((got.coarse - coarse).abs().max() / coarse.abs().max()).item() < 2e-6
    return got


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of 16x16, on every device, so that a small matrix has many."""
    monkeypatch.setattr(configs, "default", lambda *_: TINY)
    monkeypatch.setattr(linear_cut, "_FEW_TILES", 0)


@pytest.mark.parametrize("shape", LLAMA_7B, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_workspace_stays_below_64_mib(shape, axis):
    lines, reduce = shape[axis], shape[1 - axis]
    for order in ORDERS:
        for samples in (1, 10, 128, 512):
            for wide in (False, True):
                for hopper in (False, True):
                    form = linear_cut.form_of(order, True, samples * 128)
                    config = configs.default(form, wide, axis, 128, hopper)
                    plan = linear_cut.cut(config, lines, reduce, equal(samples, 128), order, True, hopper)
                    assert plan.workspace <= 64 << 20
                    assert plan.form == form
                    assert plan.u_blocks * plan.config.block_u >= lines
                    assert plan.r_blocks * plan.config.block_r >= reduce
                    # Whole waves of one program on each of 132 multiprocessors, so that none lies idle.
                    assert plan.tiles_per_launch * plan.config.block_u % (132 * 128) < plan.config.block_u


def test_cut_of_ten_samples():
    config = Config(128, 128, 64, 8, 3)
    plan = linear_cut.cut(config, 11008, 4096, equal(10, 128), "all", True, True)
    assert (plan.form, plan.fine_rows, plan.rows) == ("both", 3, 13)
    assert (plan.u_blocks, plan.r_blocks, plan.tiles) == (86, 32, 2752)
    assert (plan.length, plan.steps, plan.ragged, plan.segment) == (128, 20, False, 0)
    assert plan.workspace == 2752 * 13 * 128 * 4
    assert plan.config == config


def test_cut_of_ragged_samples():
    plan = linear_cut.cut(Config(128, 128, 64, 8, 3), 4096, 4096, [0, 1, 65, 194], "second", True)
    assert (plan.form, plan.rows, plan.ragged, plan.length) == ("square", 4, True, 129)
    assert plan.steps == 1 + 1 + 3


def test_steps_divide_samples_where_they_can():
    for length, block_k in ((128, 64), (96, 32), (80, 16), (100, 64), (16, 16), (3, 16)):
        plan = linear_cut.cut(Config(128, 128, 64, 8, 3), 4096, 4096, equal(4, length), "first", True)
        assert plan.config.block_k == block_k


def test_small_matrices_get_small_tiles():
    plan = linear_cut.cut(Config(128, 256, 64, 8, 3), 576, 1536, [0, 128], "first", False, True)
    assert (plan.config.block_u, plan.config.block_r, plan.config.warps) == (64, 64, 4)
    plan = linear_cut.cut(Config(128, 256, 64, 8, 3), 3, 5, [0, 128], "first", False, True)
    assert (plan.config.block_u, plan.config.block_r) == (16, 16)


def test_long_chains_are_rounded():
    """The tensor cores' truncation is cut off after 2048 tokens, with samples and without."""
    config = Config(128, 128, 64, 8, 3)
    assert linear_cut.form_of("first", False, 2048) == "total"
    assert linear_cut.form_of("first", False, 2049) == "sum"
    pieces = linear_cut.cut(config, 4096, 4096, [0, 5000], "first", False)
    assert (pieces.length, pieces.steps, pieces.ragged, pieces.segment, pieces.rows) == (1024, 79, False, 0, 2)
    samples = linear_cut.cut(config, 4096, 4096, [0, 5000, 6000], "all", True)
    assert samples.segment * samples.config.block_k == 1024
    assert samples.config.block_r == 64


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("order", "per_sample"), [("all", True), ("first", False)])
def test_many_launches_are_one_result(monkeypatch, tiny_tiles, axis, order, per_sample):
    """Chunks of two tiles that end within a band of blocks, added into the result one after another."""
    device = need("triton", "linear_importance")
    made = operands((72, 40), 40, device)
    options = {"per_sample": per_sample, "group_size": 8}
    once = run(made, [0, 9, 40], axis, order, **options)
    monkeypatch.setattr(linear_cut, "_WORKSPACE", 0)
    monkeypatch.setattr(linear_cut, "_WAVE", 32)
    plan = linear_cut.cut(TINY, *((72, 40) if axis == 0 else (40, 72)), [0, 9, 40], order, per_sample)
    assert (plan.tiles, plan.tiles_per_launch) == (15, 2)
    chunks = run(made, [0, 9, 40], axis, order, **options)
    for a, b in zip(chunks, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    twice = tuple(t.clone() for t in chunks)
    ops.linear_importance(*made, samples=[0, 9, 40], axis=axis, order=order, out=twice, backend="triton", **options)
    for a, b in zip(twice, chunks, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 5, 30])
def test_groups_straddle_tiles(tiny_tiles, group_size):
    device = need("triton", "linear_importance")
    run(operands((60, 35), 24, device), [0, 8, 24], 0, "mixed", group_size=group_size)


@pytest.mark.parametrize("axis", [0, 1])
def test_segments(monkeypatch, tiny_tiles, axis):
    """Samples longer than a chain, and a chain that ends within a sample; samples not told apart, in pieces."""
    device = need("triton", "linear_importance")
    monkeypatch.setattr(linear_cut, "_LONGEST_ACCUMULATION", 64)
    made = operands((20, 33), 200, device)
    assert linear_cut.cut(TINY, 20, 33, [0, 90, 200], "all", True).segment == 2
    run(made, [0, 90, 200], axis, "all")
    run(made, [0, 100, 200], axis, "all")
    run(made, [0, 200], axis, "first", per_sample=False)


@pytest.mark.parametrize("single", [False, True])
def test_single_steps(monkeypatch, tiny_tiles, single):
    """Samples of one step, with and without the branch at a sample's end."""
    device = need("triton", "linear_importance")
    monkeypatch.setattr(configs, "default", lambda *_: dataclasses.replace(TINY, single=single))
    made = operands((20, 33), 44, device)
    run(made, [0, 11, 22, 33, 44], 0, "all")
    run(made, [0, 16, 19, 30, 44], 1, "all")


def test_the_programs_of_a_persistent_launch_share_the_tiles(monkeypatch, tiny_tiles):
    device = need("triton", "linear_importance")
    made = operands((40, 50), 33, device)
    results = []
    for multiprocessors in (1, 5, 1000):
        monkeypatch.setattr(triton_linear, "_multiprocessors", lambda _, n=multiprocessors: n)
        results.append(run(made, [0, 33], 0, "first", per_sample=False))
    for other in results[1:]:
        assert torch.equal(other.fine, results[0].fine)
        assert torch.equal(other.coarse, results[0].coarse)


# Tuned configurations.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYWIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "linear.json"


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("HYWIA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.path() == tmp_path / "hywia_kernels" / "linear.json"
    monkeypatch.setenv("HYWIA_CACHE", str(tmp_path / "own"))
    assert configs.path() == tmp_path / "own" / "linear.json"


def test_key():
    key = configs.key("NVIDIA H100 80GB HBM3", "both", "bfloat16", 1, 4096, 11008, 1280, 10)
    assert key == "NVIDIA H100 80GB HBM3|both|bfloat16|axis1|4096x16384x2048x16"
    assert configs.key("d", "sum", "float16", 0, 1, 1, 1, 1) == "d|sum|float16|axis0|1x1x1x1"


def test_round_trip(cache):
    assert configs.read() == {}
    entries = {"a": Config(128, 256, 64, 8, 3, group=16), "b": Config(64, 64, 32, 4, 2, single=True)}
    for name, config in entries.items():
        configs.write(name, config)
    assert configs.read() == entries
    configs.write("a", entries["b"])
    assert configs.read() == {"a": entries["b"], "b": entries["b"]}
    assert [p.name for p in cache.parent.iterdir()] == ["linear.json"]


GOOD = {"block_u": 64, "block_r": 64, "block_k": 32, "warps": 4, "stages": 2}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "\xff\xfe",
        json.dumps({"configs": {}}),
        json.dumps({"version": configs.VERSION, "configs": []}),
        json.dumps({"version": configs.VERSION, "configs": {"a": {}}}),
        json.dumps({"version": configs.VERSION, "configs": {"a": {**GOOD, "colour": 3}}}),
        json.dumps({"version": configs.VERSION, "configs": {"a": {**GOOD, "block_u": 48}}}),
        json.dumps({"version": configs.VERSION, "configs": {"a": {**GOOD, "warps": "4"}}}),
        json.dumps({"version": configs.VERSION + 1, "configs": {"a": GOOD}}),
    ],
)
def test_a_broken_file_is_reported_and_ignored(cache, caplog, content):
    cache.parent.mkdir()
    cache.write_bytes(content.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert configs.read() == {}
    assert [str(cache) in r.message for r in caplog.records] == [True]
    configs.write("b", Config(**GOOD))
    assert configs.read() == {"b": Config(**GOOD)}


def test_a_disk_that_refuses_is_reported(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYWIA_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        configs.write("a", Config(**GOOD))
    assert any("cannot be written" in r.message for r in caplog.records)


def test_candidates_are_possible_and_hold_the_defaults():
    for form in configs.FORMS:
        for wide in (False, True):
            found = configs.candidates(form, wide)
            assert len(found) == len(set(found))
            assert all(c.valid() for c in found)
            for axis in (0, 1):
                for length in (128, 129):
                    assert configs.default(form, wide, axis, length, True) in found
                    assert configs.default(form, wide, axis, length, False) == configs.PORTABLE


def test_tuning_measures_once_and_remembers(cache, monkeypatch):
    """The fastest candidate is taken and kept; a later process reads it and measures nothing."""
    made = operands((64, 64), 32, "cpu")
    fastest = configs.candidates("both", True)[-1]
    measured = []

    def median(run):
        measured.append(run.args[0].config)
        return 1.0 if len(measured) == len(configs.candidates("both", True)) else 2.0

    monkeypatch.setattr(triton_linear, "_median", median)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "a card")
    monkeypatch.setattr(triton_linear, "_chosen", {})
    call = ("both", *made[:2], LinearCall(*made, [0, 16, 32], 0, "all", 1, True, 1.0))
    assert triton_linear._tuned(*call) == fastest
    assert len(measured) == len(configs.candidates("both", True))
    assert configs.read() == {"a card|both|float32|axis0|64x64x32x2": fastest}
    triton_linear._chosen.clear()
    assert triton_linear._tuned(*call) == fastest
    assert len(measured) == len(configs.candidates("both", True))


def test_nothing_is_read_or_tuned_unless_asked_for(cache, monkeypatch, tiny_tiles):
    device = need("triton", "linear_importance")

    def never(*_):
        raise AssertionError("the cache was consulted")

    monkeypatch.delenv(configs.AUTOTUNE, raising=False)
    monkeypatch.setattr(configs, "read", never)
    monkeypatch.setattr(triton_linear, "_tuned", never)
    run(operands((20, 20), 16, device), [0, 16], 0, "first")
