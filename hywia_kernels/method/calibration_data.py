"""Calibration samples: from a text file, a dataset, or the model's own writing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import HywiaError, UsageError
from ..settings import SAMPLES, SEQ_LEN
from .reading import documents
from .tokens import check_length, check_tokens, digest, encode, prefix
from .writing import self_written

__all__ = ["calibration", "check_tokens", "digest", "documents", "self_written", "windows"]

_POOL = 1000  # documents of a stream that are shuffled together


def calibration(
    model: Any,
    tokenizer: Any,
    source: str | None = None,
    *,
    samples: int = SAMPLES,
    seq_len: int = SEQ_LEN,
    seed: int = 0,
    fewer: bool = False,
    bos: bool | None = None,
    field: str = "text",
) -> Tensor:
    """Calibration token ids, int64 `[samples, seq_len]`, on the CPU; the same arguments give the same ids.

    Args:
        model: writes the text, where there is no source; may be None where there is one.
        source: a `.txt` file (one text), a `.jsonl` file (a `text` field per line), a `.json` file (a list of such),
            a `.csv` or `.tsv` file with a header (a row each), any of these with `.gz`, a `.parquet` file, a directory
            of such files, `NAME[:config[:split]]` of a dataset on the hub or a local directory `datasets` can read, or
            None: text the model writes itself.
        samples, seq_len: how many samples of how many tokens, the beginning-of-text token counted.
        seed: for the choice of windows, or for the writing.
        fewer: return as many samples as the text holds where these are fewer than asked for, but at least one.
        bos: whether each sample begins with the beginning-of-text token. None: where the tokenizer puts one before a
            text by itself (Llama 2 and 3, Gemma, Mistral; not GPT-2), but for one in eight written samples.
        field: the field of an object, or the column of a table or dataset, that holds the text.

    Raises:
        UsageError: samples or seq_len out of range, or beyond the model's positions, or `bos=True` without such a
            token. HywiaError: the source is missing, empty, no text, or too short, or the tokenizer fails on it.
    """
    if samples < 1:
        raise UsageError(f"samples: expected at least 1, got {samples}")
    if seq_len < 2:
        raise UsageError(f"seq_len: expected at least 2 (a next-token loss needs two tokens), got {seq_len}")
    if model is not None:
        check_length(model, seq_len)
    if source is None:
        return self_written(model, tokenizer, samples=samples, seq_len=seq_len, seed=seed, bos=bos)
    texts = documents(str(source), field=field)
    return windows(texts, tokenizer, samples=samples, seq_len=seq_len, seed=seed, fewer=fewer, bos=bos)


def windows(
    texts: Any,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    fewer: bool = False,
    bos: bool | None = None,
) -> Tensor:
    """Seeded windows of `seq_len` tokens, int64 `[samples, seq_len]`, on the CPU.

    Several documents: one random window from each of the documents that are long enough, in shuffled order; when they
    do not suffice, the rest comes from what the short documents give when joined by the end-of-text token, and then
    from further windows of the long documents that overlap none taken before. One document: distinct blocks of it.
    A stream (any iterable but a list), which may be endless, is taken a thousand documents at a time, and its short
    documents before the next thousand. Fewer samples are a prefix of more. Special tokens are not added but for what
    `calibration` says of `bos`: each window then begins with it, and has a token less of the text.
    """
    begin = prefix(tokenizer, bos)
    if seq_len <= len(begin):
        raise UsageError(f"seq_len: expected at least {len(begin) + 1}, got {seq_len}")
    drawn = _windows(texts, tokenizer, seq_len - len(begin), random.Random(seed))
    chosen = [[*begin, *window] for window in itertools.islice(drawn, samples)]
    if len(chosen) < samples and not (fewer and chosen):
        if not chosen:
            raise HywiaError(f"calib: the text is shorter than one sample of {seq_len} tokens; give more text")
        raise HywiaError(
            f"calib: the text holds {len(chosen)} samples of {seq_len} tokens, {samples} were asked for; "
            f"give more text, or --samples {len(chosen)}, or a shorter --seq-len"
        )
    return torch.tensor(chosen, dtype=torch.int64, device="cpu")


def _windows(texts: Any, tokenizer: Any, length: int, rng: random.Random) -> Iterator[list[int]]:
    """All windows of the texts, in an order that does not depend on how many are taken."""
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    further: list[list[int]] = []
    empty = True
    for pool, alone in _pools(texts):
        empty = empty and not pool
        rng.shuffle(pool)
        short: list[int] = []
        yielded = 0
        for number, text in pool:
            ids = encode(tokenizer, text, f"calib: document {number} of the source")
            if alone:
                blocks = _blocks(ids, length)
                rng.shuffle(blocks)
                yield from blocks
                return
            if len(ids) < length:
                short += ids + separator
                continue
            start = rng.randint(0, len(ids) - length)
            yield ids[start : start + length]
            yielded += 1
            beside = (*range(start - length, -1, -length), *range(start + length, len(ids) - length + 1, length))
            further += [ids[i : i + length] for i in beside]
        joined = _blocks(short, length)
        yield from joined
        if not yielded + len(joined):
            break  # a thousand documents without one window: an endless stream would go on like that
    if empty:
        raise HywiaError("calib: the source holds no text")
    rng.shuffle(further)
    yield from further


def _blocks(ids: list[int], length: int) -> list[list[int]]:
    """Blocks of `length` ids, one after another; what is left at the end is dropped."""
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def _pools(texts: Any) -> Iterator[tuple[list[tuple[int, str]], bool]]:
    """Pools of `(number from 1, document)` to be shuffled, without blank documents, each with whether it holds the only
    document of all."""
    numbered = enumerate(texts, 1)
    size = len(texts) if isinstance(texts, list) else _POOL
    first = True
    while True:
        pool = list(itertools.islice(numbered, size))
        if not pool:
            return
        last = isinstance(texts, list) or len(pool) < size
        pool = [(number, text) for number, text in pool if text.strip()]
        yield pool, first and last and len(pool) == 1
        if last:
            return
        first = False
