"""Perplexity, size and speed of a model."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import progress
from .errors import HywiaError, UsageError
from .packed import count_weights
from .weights import weight_bytes

__all__ = ["blocks", "continuation", "evaluate", "perplexity", "stored_bytes", "tokens_per_second"]


def blocks(tokenizer: Any, text: str, block: int = 128, max_blocks: int | None = None) -> Tensor:
    """The papers' protocol: tokenise the whole string, cut it into blocks, drop the rest. int64 `[blocks, block]`.

    Raises:
        UsageError: block below 2 or max_blocks below 1. HywiaError: the text is shorter than one block.
    """
    if block < 2:
        raise UsageError(f"block: expected at least 2 tokens, got {block}")
    if max_blocks is not None and max_blocks < 1:
        raise UsageError(f"max_blocks: expected at least 1, got {max_blocks}")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(len(ids) // block, max_blocks or len(ids))
    if count == 0:
        raise HywiaError(f"text: expected at least one block of {block} tokens, got {len(ids)} tokens")
    return torch.tensor(ids[: count * block], dtype=torch.int64).view(count, block)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, *, batch: int = 8) -> float:
    """`exp` of the mean next-token loss over int64 `[blocks, block]`; float32 logits, float64 mean.

    Raises:
        HywiaError: the loss is NaN.
    """
    device = model.get_input_embeddings().weight.device
    total = 0.0
    for chunk in progress.track(tokens.split(batch), "perplexity"):
        ids = chunk.to(device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        total += float(loss.double().sum())
    mean = total / (tokens.shape[0] * (tokens.shape[1] - 1))
    if math.isnan(mean):
        raise HywiaError("model: its loss is NaN; check its weights, or load it in float32 or bfloat16")
    return math.exp(min(mean, 700.0))


@torch.no_grad()
def tokens_per_second(model: Any, *, prompt: int = 16, new: int = 32, repeats: int = 3) -> float:
    """Tokens a second of greedy generation: one sequence, a KV cache, median of `repeats` after a warm-up."""
    from transformers import GenerationConfig

    weight = model.get_input_embeddings().weight
    ids = torch.arange(prompt, device=weight.device)[None] % weight.shape[0]
    config = GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    times = []
    for _ in range(repeats + 1):
        _synchronise(weight.device)
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        _synchronise(weight.device)
        times.append(time.perf_counter() - start)
    return new / statistics.median(times[1:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, prompt: str, new: int = 40) -> str:
    """Greedy continuation of a prompt, the prompt left out."""
    from transformers import GenerationConfig

    inputs = tokenizer(prompt, return_tensors="pt").to(model.get_input_embeddings().weight.device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def stored_bytes(source: str | Path) -> int | None:
    """Bytes of the safetensors files in a directory; None when there are none (a hub id, a GGUF file)."""
    folder = Path(source)
    sizes = [f.stat().st_size for f in folder.glob("*.safetensors")] if folder.is_dir() else []
    return sum(sizes) or None


def evaluate(
    model: Any, tokenizer: Any, text: str, *, block: int = 128, max_blocks: int | None = None, source: str | Path = ""
) -> dict[str, float]:
    """Quality, size and speed: keys `perplexity`, `parameters`, `bytes`, `tokens_per_second`.

    `bytes` is the size of `source`'s safetensors files; without such files, what the weights would take as
    safetensors in their present dtype. `tokens_per_second` is greedy generation, one sequence.
    """
    return {
        "perplexity": perplexity(model, blocks(tokenizer, text, block, max_blocks)),
        "parameters": count_weights(model),
        "bytes": (stored_bytes(source) if source else None) or weight_bytes(model),
        "tokens_per_second": tokens_per_second(model),
    }
