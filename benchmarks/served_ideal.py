"""What a served model has to do at least, and how near an engine's speed-up over another model comes to the ideal.

A batch of prompts takes its FLOPs, each later token of all sequences the bytes of the weights and of the caches. The
ideal time is FLOPs over the measured rate of a matrix product plus bytes over the measured bandwidth, and the ideal
speed-up the ratio of two such times: neither launches nor sampling are in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hywia_kernels.deploy.cost import Cost, cost_of

from .rows import Row


def of_config(path: str) -> tuple[Cost, int]:
    """Cost and vocabulary of the model that a directory's config describes; its weights are not read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    return cost_of(model), config.vocab_size


def work(cost: Cost, sequences: int, context: int, new: int) -> dict[str, float]:
    """FLOPs of the prompts, and bytes of the tokens after the first, by the columns of these names."""
    steps = sum(cost.decode_bytes(sequences, context + i) for i in range(1, new))
    return {"prefill_flops": cost.prefill_flops(sequences, context), "decode_bytes": steps}


def seconds(row: Row) -> float:
    """The ideal time of a row's work on its device."""
    return row.prefill_flops / (row.matmul_tflop_s * 1e12) + row.decode_bytes / (row.read_gb_s * 1e9)


def report(rows: Sequence[Row], checkpoint: str) -> list[str]:
    """A line a row of speed of a checkpoint: its speed-up over the first checkpoint's, the ideal, and their ratio."""
    lines = []
    kept = [row for row in rows if row.tokens_per_second and row.prefill_flops and row.matmul_tflop_s]
    first: dict[tuple, Row] = {}
    for row in kept:
        before = first.setdefault((row.engine, row.format, row.tensor_parallel, row.sequences, row.context), row)
        if before is row or row.checkpoint != checkpoint:
            continue
        gain, best = row.tokens_per_second / before.tokens_per_second, seconds(before) / seconds(row)
        names = f"{Path(row.checkpoint).name} over {Path(before.checkpoint).name}"
        lines.append(
            f"{names}, {row.engine} {row.format}, {row.sequences} at once: {gain:.3f} times, "
            f"{gain / best:.3f} of the ideal {best:.3f}"
        )
    return lines
