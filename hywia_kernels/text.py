"""Calibration samples: from a text file, a dataset, or the model's own writing."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import progress
from .errors import HywiaError, UsageError

__all__ = ["calibration", "check_tokens", "digest", "documents", "self_written", "windows"]

_FILES = (".txt", ".jsonl")


def calibration(
    model: Any,
    tokenizer: Any,
    source: str | None = None,
    *,
    samples: int = 96,
    seq_len: int = 128,
    seed: int = 0,
    fewer: bool = False,
) -> Tensor:
    """Calibration token ids, int64 `[samples, seq_len]`, on the CPU; the same arguments give the same ids.

    Args:
        source: a `.txt` file (one text), a `.jsonl` file (a `text` field per line), `NAME[:config[:split]]` of a
            dataset on the hub or a local directory `datasets` can read, or None: text the model writes itself.
        samples, seq_len: how many samples of how many tokens.
        seed: of the choice of windows, or of the writing.
        fewer: take what there is when the text holds at least one sample, but not as many.

    Raises:
        UsageError: samples or seq_len out of range. HywiaError: the source is missing, empty, or too short.
    """
    if samples < 1:
        raise UsageError(f"samples: expected at least 1, got {samples}")
    if seq_len < 2:
        raise UsageError(f"seq_len: expected at least 2 (a next-token loss needs two tokens), got {seq_len}")
    if source is None:
        return self_written(model, tokenizer, samples=samples, seq_len=seq_len, seed=seed)
    return windows(documents(source), tokenizer, samples=samples, seq_len=seq_len, seed=seed, fewer=fewer)


def documents(source: str) -> list[str] | Any:
    """The texts of a source: a list for files, an iterator for datasets.

    Raises:
        HywiaError: a missing, unreadable or empty file, a line without `text`, or a dataset that cannot be had.
    """
    path = Path(source)
    if path.suffix in _FILES or path.is_file():
        return _file_documents(path)
    return _dataset_documents(source)


def _file_documents(path: Path) -> list[str]:
    if path.suffix not in _FILES:
        raise HywiaError(f"calib: expected a .txt or .jsonl file, got {path}")
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HywiaError(f"calib: no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HywiaError(f"calib: cannot read {path} as UTF-8 text: {error}") from error
    if not content.strip():
        raise HywiaError(f"calib: {path} is empty")
    if path.suffix == ".txt":
        return [content]
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            raise HywiaError(f"calib: {path}, line {number}: expected a JSON object with a 'text' field") from None
        if not isinstance(text, str):
            raise HywiaError(f"calib: {path}, line {number}: expected 'text' to be a string, got {type(text).__name__}")
        texts.append(text)
    return texts


def _dataset_documents(source: str):
    try:
        import datasets
    except ImportError:
        raise HywiaError(
            f"calib: {source!r} is no .txt or .jsonl file; a dataset needs: pip install 'hywia_kernels[hub]'"
        ) from None
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise HywiaError(f"calib: dataset {source!r} has no 'text' column; it has {sorted(row)}")
            yield row["text"]
    except HywiaError:
        raise
    except Exception as error:  # datasets raises many kinds: not found, no network, bad config
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HywiaError(f"calib: could not read dataset {source!r}: {reason}") from error


def windows(texts: Any, tokenizer: Any, *, samples: int, seq_len: int, seed: int, fewer: bool = False) -> Tensor:
    """Seeded windows of `seq_len` tokens, int64 `[samples, seq_len]`.

    Several documents: one random window from each of the documents that are long enough, in shuffled order; when they
    do not suffice, the rest comes from what the short documents give when joined by the end-of-text token, and then
    from further windows of the long documents that overlap none taken before. One document: distinct blocks of it.
    Fewer samples are a prefix of more. Special tokens are not added, as in the papers' protocols.
    """
    rng = random.Random(seed)
    pool = _draw(texts, rng, want=max(20 * samples, 1000))
    chosen: list[list[int]] = []
    further: list[list[int]] = []
    short: list[int] = []
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    blocks: list[list[int]] = []
    for text in pool:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(pool) == 1:
            blocks = [ids[i : i + seq_len] for i in range(0, len(ids) - seq_len + 1, seq_len)]
            rng.shuffle(blocks)
        elif len(ids) >= seq_len:
            start = rng.randint(0, len(ids) - seq_len)
            chosen.append(ids[start : start + seq_len])
            beside = (*range(start - seq_len, -1, -seq_len), *range(start + seq_len, len(ids) - seq_len + 1, seq_len))
            further += [ids[i : i + seq_len] for i in beside]
        else:
            short += ids + separator
        if len(chosen) == samples:
            break
    if len(chosen) < samples and not blocks:
        blocks = [short[i : i + seq_len] for i in range(0, len(short) - seq_len + 1, seq_len)]
        rng.shuffle(further)
        blocks += further
    chosen += blocks[: samples - len(chosen)]
    if len(chosen) < samples and not (fewer and chosen):
        if not chosen:
            raise HywiaError(f"calib: the text is shorter than one sample of {seq_len} tokens; give more text")
        raise HywiaError(
            f"calib: the text holds {len(chosen)} samples of {seq_len} tokens, {samples} were asked for; "
            f"give more text, or --samples {len(chosen)}, or a shorter --seq-len"
        )
    return torch.tensor(chosen, dtype=torch.int64)


def _draw(texts: Any, rng: random.Random, want: int) -> list[str]:
    """Documents in shuffled order; of a stream, which may be endless, only the first `want`."""
    if not isinstance(texts, list):
        texts = [text for _, text in zip(range(want), texts, strict=False)]
    texts = [t for t in texts if t.strip()]
    if not texts:
        raise HywiaError("calib: the source holds no text")
    texts = list(texts)
    rng.shuffle(texts)
    return texts


def self_written(model: Any, tokenizer: Any, *, samples: int, seq_len: int, seed: int, batch: int = 64) -> Tensor:
    """Text the model writes itself, int64 `[samples, seq_len]`: no data is needed.

    Each sample starts from the beginning-of-text token (if there is one) and one random ordinary token, and is then
    sampled at temperature 1 without an end. The idea of data-free calibration from the model's own generations is
    LLM-QAT's (arXiv 2305.17888).
    """
    from transformers import GenerationConfig

    device = model.get_input_embeddings().weight.device
    vocabulary = min(model.get_input_embeddings().num_embeddings, len(tokenizer))
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(vocabulary) if i not in special]
    rng = random.Random(seed)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    starts = torch.tensor([[*bos, rng.choice(ordinary)] for _ in range(samples)], dtype=torch.int64)
    if starts.shape[1] >= seq_len:
        return starts[:, :seq_len]
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=seq_len,
        suppress_tokens=sorted(special) or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    written = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for chunk in progress.track(starts.split(batch), "writing calibration text"):
            ids = chunk.to(device)
            mask = torch.ones_like(ids)
            written.append(model.generate(ids, attention_mask=mask, generation_config=config).cpu())
    return torch.cat(written)


def digest(tokens: Tensor) -> str:
    """sha256 of calibration token ids, kept in the record."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Raise HywiaError when an id lies outside `[0, vocabulary)`."""
    if tokens.numel() == 0:
        raise UsageError("batches: expected at least one sample, got none")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise HywiaError(
            f"batches: expected token ids within the model's vocabulary [0, {vocabulary}), got ids from {low} to "
            f"{high}; the tokenizer is not this model's"
        )
