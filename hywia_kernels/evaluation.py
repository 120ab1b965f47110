"""Perplexity, size and speed of a model."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import progress
from .arch.facts import weight_bytes
from .arch.holding import unwrapped
from .checkpoint.packed import count_weights
from .checkpoint.weight_files import weight_files
from .errors import HywiaError, UsageError
from .method.reading import BUNDLED, bundled_text, file_documents
from .method.tokens import check_length, check_tokens, encode, positions, prefix
from .method.writing import continuation, evaluating, greedy, prompt_tokens
from .settings import BLOCK

__all__ = [
    "Evaluation",
    "blocks",
    "continuation",
    "evaluate",
    "perplexity",
    "speeds",
    "stored_bytes",
    "tokens_per_second",
]


def blocks(
    tokenizer: Any, text: str, block: int = BLOCK, max_blocks: int | None = None, *, bos: bool | None = None
) -> Tensor:
    """The text's tokens, int64 `[blocks, block]`, by the papers' protocol: the whole string is tokenised and cut into
    blocks, and what is left at the end is dropped.

    Where the tokenizer puts a beginning-of-text token before a text by itself (or `bos` is True; False: nowhere), each
    block begins with it and has `block - 1` tokens of the text.

    Raises:
        UsageError: block below 2 or max_blocks below 1, or `bos=True` without such a token. HywiaError: the text is
            shorter than one block, or the tokenizer fails on it.
    """
    if block < 2:
        raise UsageError(f"block: expected at least 2 tokens, got {block}")
    if max_blocks is not None and max_blocks < 1:
        raise UsageError(f"max_blocks: expected at least 1, got {max_blocks}")
    begin = prefix(tokenizer, bos)
    length = block - len(begin)
    if length < 1:
        raise UsageError(f"block: expected at least {len(begin) + 1} tokens, got {block}")
    ids = encode(tokenizer, text, "text")
    count = min(len(ids) // length, max_blocks or len(ids))
    if count == 0:
        beside = f" and {len(begin)} before each block" if begin else ""
        raise HywiaError(
            f"text: expected at least one block of {block} tokens, got {len(ids)} tokens{beside}; "
            "give more text, or a smaller --block"
        )
    cut = torch.tensor(ids[: count * length], dtype=torch.int64, device="cpu").view(count, length)
    return torch.cat([torch.tensor([begin] * count, dtype=torch.int64, device="cpu").view(count, len(begin)), cut], 1)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, *, batch: int = 8) -> float:
    """`exp` of the mean next-token loss over int64 `[blocks, block]`, from float32 logits and a float64 mean.

    Every token but a block's first is predicted, from those before it in its block: `blocks · (block - 1)` losses, of
    which one in each block is that of the first token behind the beginning-of-text token, where there is one. The model
    is in eval mode meanwhile.

    Raises:
        UsageError: no blocks, blocks of one token or longer than the model's positions, or a batch below 1.
        HywiaError: ids beyond the vocabulary, or the loss is NaN.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise UsageError("tokens: expected int64 token ids [blocks, block]")
    if batch < 1:
        raise UsageError(f"batch: expected at least 1, got {batch}")
    model = unwrapped(model)
    check_tokens(tokens, model, "block")
    if tokens.shape[1] < 2:
        raise UsageError(f"block: expected at least 2 tokens, got {tokens.shape[1]}")
    device = model.get_input_embeddings().weight.device
    total = 0.0
    with evaluating(model):
        for chunk in progress.track(tokens.split(batch), "perplexity"):
            ids = chunk.to(device=device, dtype=torch.int64)
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            total += float(loss.double().sum())
    mean = total / (tokens.shape[0] * (tokens.shape[1] - 1))
    if math.isnan(mean):
        raise HywiaError("model: its loss is NaN; check its weights, or load it in float32 or bfloat16")
    return math.exp(min(mean, 700.0))


def tokens_per_second(model: Any, *, prompt: int = 16, new: int = 32, repeats: int = 3) -> float:
    """Tokens a second of eager greedy generation, for one sequence with a KV cache: the median of `repeats` runs after
    a warm-up.

    On a GPU the launches of kernels take most of that time, and a smaller model has as many of them; `hywia bench`
    measures decoding without them. A model with fewer positions than `prompt + new` writes fewer tokens.

    Raises:
        HywiaError: the model does not write as many tokens as it is asked for.
    """
    return speeds([model], prompt=prompt, new=new, repeats=repeats)[0]


@torch.no_grad()
def speeds(models: Sequence[Any], *, prompt: int = 16, new: int = 32, repeats: int = 3) -> list[float]:
    """`tokens_per_second` of several models, their runs in turns: what else the machine does meanwhile hits all alike,
    so that their ratio means something.

    Raises:
        HywiaError: as `tokens_per_second`.
    """
    runs = [_Run.of(unwrapped(model), prompt, new) for model in models]
    for turn in range(repeats + 1):
        for run in runs if turn % 2 else runs[::-1]:
            run.take()
    return [run.new / statistics.median(run.seconds[1:]) for run in runs]


@dataclass
class _Run:
    """One model's runs: `ids` int64 `[1, prompt]`, `new` tokens to write, seconds so far."""

    model: Any
    ids: Tensor
    new: int
    seconds: list[float]

    @classmethod
    def of(cls, model: Any, prompt: int, new: int) -> _Run:
        weight = model.get_input_embeddings().weight
        most = positions(model)
        if most is not None and prompt + new > most:
            prompt = min(prompt, most // 2)
            new = most - prompt
        return cls(model, torch.arange(prompt, device=weight.device)[None] % weight.shape[0], new, [])

    def take(self) -> None:
        _synchronise(self.ids.device)
        start = time.perf_counter()
        made = greedy(self.model, self.ids, self.new)
        _synchronise(self.ids.device)
        self.seconds.append(time.perf_counter() - start)
        written = made.shape[1] - self.ids.shape[1]
        if written != self.new:
            raise HywiaError(f"model: expected it to write {self.new} tokens, got {written}")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stored_bytes(source: str | Path) -> int | None:
    """Bytes of the safetensors files that hold a directory's weights; None when there are none (a hub id, a GGUF
    file)."""
    if not Path(source).is_dir():
        return None
    try:
        return sum(file.stat().st_size for file in weight_files(source))
    except HywiaError:
        return None


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    block: int = BLOCK,
    max_blocks: int | None = None,
    source: str | Path = "",
    bos: bool | None = None,
    name: str = "given",
) -> dict[str, Any]:
    """Quality, size and speed of a model: keys `perplexity`, `parameters`, `bytes`, `tokens_per_second`, `text`.

    `bytes` is the size of the safetensors files that hold `source`'s weights; without such files, what the weights
    would take as safetensors in their present dtype. `tokens_per_second` is eager greedy generation, one sequence.
    `text` says on what perplexity was measured: `name`, `sha256` of the whole text in UTF-8, `blocks`, `block` and
    `tokens` (blocks · block) that were read, and `bos`, whether each block begins with the beginning-of-text token.
    `block`, `max_blocks` and `bos` are those of `blocks`.

    Raises:
        UsageError, HywiaError: as `blocks` and `perplexity`.
    """
    check_length(model, block, "block")
    tokens = blocks(tokenizer, text, block, max_blocks, bos=bos)
    return {
        "perplexity": perplexity(model, tokens),
        "parameters": count_weights(model),
        "bytes": (stored_bytes(source) if source else None) or weight_bytes(model),
        "tokens_per_second": tokens_per_second(model),
        "text": {
            "name": name,
            "sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
            "blocks": tokens.shape[0],
            "block": tokens.shape[1],
            "tokens": tokens.numel(),
            "bos": bool(prefix(tokenizer, bos)),
        },
    }


@dataclass(frozen=True)
class Evaluation:
    """What to measure of a model: `evaluate` on one text, read once, and a continuation.

    Attributes:
        text: a text file of the kinds that calibration takes; None: the prose that comes with the package.
        field: the field of its objects, or column of its table, that holds the text.
        block, max_blocks, bos: as `blocks` takes them.
        prompt: a text whose greedy continuation is recorded; None: no continuation.
    """

    text: str | None = None
    field: str = "text"
    block: int = BLOCK
    max_blocks: int | None = 40
    bos: bool | None = None
    prompt: str | None = None

    @cached_property
    def content(self) -> tuple[str, str]:
        """`(name, text)`; the documents of a file that holds several are joined with an empty line between them.

        Raises:
            UsageError: block or max_blocks out of range. HywiaError: the file cannot be read.
        """
        if self.block < 2 or (self.max_blocks is not None and self.max_blocks < 1):
            raise UsageError("block: expected a block of at least 2 tokens and max_blocks of at least 1")
        if self.text is None:
            return BUNDLED, bundled_text()
        path = Path(self.text)
        if not path.is_file():
            raise HywiaError(f"text: cannot read {path}: {'it is a directory' if path.is_dir() else 'no such file'}")
        return str(path), "\n\n".join(file_documents(path, field=self.field, argument="text"))

    def check(self, model: Any, tokenizer: Any) -> None:
        """Check, before any work, that the model's positions and the text allow what is to be measured.

        Raises:
            UsageError, HywiaError: as `evaluate` and `continuation`.
        """
        check_length(model, self.block, "block")
        blocks(tokenizer, self.content[1], self.block, self.max_blocks, bos=self.bos)
        if self.prompt:
            prompt_tokens(model, tokenizer, self.prompt, self.bos)

    def measure(self, model: Any, tokenizer: Any, source: str | Path = "") -> dict[str, Any]:
        """What `evaluate` gives, and `continuation` where there is a prompt. `source`: where the model's files lie."""
        name, text = self.content
        measured = evaluate(
            model,
            tokenizer,
            text,
            block=self.block,
            max_blocks=self.max_blocks,
            source=source,
            bos=self.bos,
            name=name,
        )
        if self.prompt:
            measured["continuation"] = continuation(model, tokenizer, self.prompt, bos=self.bos)
        return measured
