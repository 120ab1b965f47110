"""What a model takes to run: multiplications as the papers count them, latency and memory."""

from __future__ import annotations

from typing import Any

import torch

from hywia_kernels.deploy.cost import Cost
from hywia_kernels.deploy.speed import Case, measure

MACS_TOKENS = 64  # of the forward pass whose multiplications LLM-Pruner's paper counts


def macs(cost: Cost, tokens: int = MACS_TOKENS) -> int:
    """Multiplications of one forward pass over a text: every matrix and the head for each token, and attention's two
    products over all pairs of positions. LLM-Pruner's counter adds norms, softmax and rotary embedding, 0.02 % of
    LLaMA-7B's."""
    matrices = sum(outputs * inputs for outputs, inputs in cost.matrices) + cost.head
    return tokens * matrices + 2 * tokens * tokens * sum(cost.attention)


def latency(model: Any, context: int, mode: str, runs: int) -> tuple[dict[str, Any], str | None]:
    """Columns of a row: milliseconds of a prompt of `context` tokens and of a token behind as many, by
    `hywia_kernels.deploy.speed`, and the memory that running takes, of this model alone; and why they are missing."""
    device = model.get_input_embeddings().weight.device
    others = 0
    if device.type == "cuda":
        own = sum(t.numel() * t.element_size() for t in {id(t): t for t in model.parameters()}.values())
        others = torch.cuda.memory_allocated(device) - own
    cases = [Case("prefill", 1, context), Case("decode", 1, context)]
    measured, reason = measure(model, cases, modes=[mode], runs=runs)
    if not measured:
        return {}, reason
    times = {f"{m.phase}_ms": m.ms for m in measured}
    peaks = [m.peak_bytes - others for m in measured if m.peak_bytes is not None]
    return {**times, "context": context, "mode": mode, "inference_peak_bytes": max(peaks, default=None)}, None
