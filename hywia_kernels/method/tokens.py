"""Token ids: how a text is encoded, what a tokenizer puts before it, and which ids a model can take."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HywiaError, UsageError

__all__ = ["check_length", "check_tokens", "digest", "encode", "positions", "prefix"]


def encode(tokenizer: Any, text: str, what: str) -> list[int]:
    """Token ids of a text, without special tokens. `what`: names the text in messages.

    Raises:
        HywiaError: the tokenizer fails on it.
    """
    try:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # by tokenizer and cause: TypeError, UnicodeEncodeError, ValueError, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HywiaError(f"{what}: the tokenizer fails on it ({reason}); repair or remove it") from error


def prefix(tokenizer: Any, bos: bool | None = None) -> list[int]:
    """The ids that a text begins with: the beginning-of-text token, usually.

    Args:
        bos: None: those that the tokenizer puts there by itself, if it does; True: at least its beginning-of-text
            token; False: none.

    Raises:
        UsageError: `bos` is True and the tokenizer has no such token.
    """
    if bos is False:
        return []
    bare, full = encode(tokenizer, "a", "tokenizer"), list(tokenizer("a", verbose=False)["input_ids"])
    # Some tokenizers put an end-of-text token behind the text, which does not belong to the beginning.
    begin = next((i for i in range(len(full)) if bare and full[i : i + len(bare)] == bare), None)
    if begin is None:
        begin = int(bool(full) and full[0] == tokenizer.bos_token_id)
    if begin == 0 and bos:
        if tokenizer.bos_token_id is None:
            raise UsageError("bos: expected a tokenizer with a beginning-of-text token, got one without; leave bos out")
        return [tokenizer.bos_token_id]
    return full[:begin]


def positions(model: Any) -> int | None:
    """How many positions a model has; None where any number will do.

    A table of learned positions ends somewhere (GPT-2, OPT), and so does one of computed positions (GPT-J). Rotary and
    ALiBi positions do not: they only get worse behind `max_position_embeddings`, or scale themselves (dynamic,
    longrope), and longer texts are let through.
    """
    decoder, words = model.get_decoder(), model.get_input_embeddings()
    rows = [
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Embedding) and module is not words and name.count(".") < 2 and _names_positions(name)
    ]
    rows += [len(table) for name, table in decoder.named_buffers() if name.endswith(".embed_positions")]
    return min(rows, default=None)


def _names_positions(name: str) -> bool:
    """Whether an embedding's name says that it is one of positions."""
    last = name.rpartition(".")[2]
    return last == "wpe" or "position" in last


def check_length(model: Any, length: int, name: str = "seq_len") -> None:
    """Raise UsageError when texts of so many tokens are longer than the model's positions."""
    most = positions(model)
    if most is not None and length > most:
        raise UsageError(f"{name}: the model has {most} positions, got {length}")


def check_tokens(tokens: Tensor, model: Any, name: str = "seq_len") -> None:
    """Check that the model can take samples `[samples, length]`. `name`: what messages call the length.

    Raises:
        UsageError: no sample, or samples longer than the model's positions. HywiaError: an id outside the vocabulary.
    """
    if tokens.numel() == 0:
        raise UsageError("batches: expected at least one sample, got none")
    check_length(model, tokens.shape[-1], name)
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise HywiaError(
            f"batches: expected token ids within the model's vocabulary [0, {vocabulary}), got ids from {low} to "
            f"{high}; the tokenizer is not this model's"
        )


def digest(tokens: Tensor) -> str:
    """sha256 of token ids, kept in records."""
    return hashlib.sha256(tokens.contiguous().to(torch.int64).cpu().numpy().tobytes()).hexdigest()
