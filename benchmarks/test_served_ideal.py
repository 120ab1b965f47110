"""What a served model has to do, by a config alone, and the share of the ideal speed-up."""

from __future__ import annotations

import pytest

from . import served_ideal, served_models
from .environment import Environment
from .rows import Row


def test_cost_of_shapes_by_their_configs(tmp_path):
    served_models.write_shapes(tmp_path, ["dense", "16x5120"])
    dense, vocabulary = served_ideal.of_config(str(tmp_path / "dense"))
    cut, _ = served_ideal.of_config(str(tmp_path / "16x5120"))
    assert (dense.parameters, vocabulary) == (6_738_415_616, 32000)  # LLaMA-7B's
    layer = 4 * 4096 * 16 * 128 + 3 * 4096 * 5120 + 2 * 4096
    assert cut.parameters == 32 * layer + 2 * 32000 * 4096 + 4096
    work = served_ideal.work(cut, sequences=3, context=10, new=4)
    weights = 2 * (cut.parameters - 32000 * 4096)
    cache = 3 * 2 * 2 * 32 * 16 * 128  # bytes that one more token of three sequences adds
    assert work["decode_bytes"] == 3 * weights + (11 + 12 + 13) * cache
    assert work["prefill_flops"] == cut.prefill_flops(3, 10)


def row(checkpoint, rate, flops, bytes_, tflop_s: float | None = 100.0):
    environment = Environment(
        **{**dict.fromkeys(Environment.__dataclass_fields__), "matmul_tflop_s": tflop_s, "read_gb_s": 1000.0}
    )
    told = {"checkpoint": checkpoint, "engine": "vllm", "format": "bfloat16", "tensor_parallel": 1, "sequences": 4}
    told |= {"context": 8, "tokens_per_second": rate, "prefill_flops": flops, "decode_bytes": bytes_}
    return Row(environment, told)


def test_share_of_the_ideal():
    dense, cut = row("a/dense", 10.0, 1e14, 1e12), row("a/cut", 15.0, 0.5e14, 0.5e12)
    assert served_ideal.seconds(dense) == pytest.approx(2.0)
    assert served_ideal.report([dense, cut], "a/dense") == []
    assert served_ideal.report([dense, cut], "a/cut") == [
        "cut over dense, vllm bfloat16, 4 at once: 1.500 times, 0.750 of the ideal 2.000"
    ]
    assert served_ideal.report([row("a/dense", 1, 1, 1, None), row("a/cut", 1, 1, 1, None)], "a/cut") == []
