"""Text to recover on: written by the dense model, read from sources, or a mixture; some samples are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import HywiaError
from ...settings import SELF
from ..calibration_data import calibration
from ..tokens import digest
from .request import Recovery

__all__ = ["Text", "drawn", "given", "held_out_counts"]


@dataclass(frozen=True, eq=False)
class Text:
    """What a recovery reads.

    Attributes:
        train: int64 `[samples, seq_len]`, on the CPU, in the order in which it was drawn. held_out: int64 `[held out,
            seq_len]`, likewise; no sample of it is among `train`.
        record: what it is; JSON-serialisable.
    """

    train: Tensor
    held_out: Tensor
    record: dict[str, Any]


def drawn(teacher: Any, tokenizer: Any, request: Recovery, *, bos: bool | None = None, field: str = "text") -> Text:
    """The text of a resolved request. Sources that hold less than their share give what they hold.

    Args:
        teacher: the dense model, which writes where a source is "self". bos, field: as `calibration` takes them.

    Raises:
        HywiaError: a source that cannot be read, or all of them together do not hold a sample to train on beside those
            held out. UsageError: as `calibration`.
    """
    assert request.text_tokens is not None
    assert request.seed is not None
    wanted = -(-request.text_tokens // request.seq_len)
    held = held_out_counts(request)
    train, held_out, facts = [], [], []
    for source, share, apart in zip(request.text, request.source_shares, held, strict=True):
        tokens = calibration(
            teacher,
            tokenizer,
            None if source == SELF else source,
            samples=round(share * wanted) + apart,
            seq_len=request.seq_len,
            seed=request.seed,
            fewer=True,
            bos=bos,
            field=field,
        )
        apart = min(apart, len(tokens) // 5)  # a small text is mostly trained on
        train.append(tokens[: len(tokens) - apart])
        held_out.append(tokens[len(tokens) - apart :])
        facts.append({"source": source, "samples": len(train[-1]), "held_out": apart})
    return _text(torch.cat(train), torch.cat(held_out), {"sources": facts})


def given(tokens: Tensor, request: Recovery) -> Text:
    """Text at hand already, int64 `[samples, length]`; the last samples are held out.

    Raises:
        HywiaError: there is no sample to train on beside those held out.
    """
    apart = min(request.held_out, len(tokens) // 5)
    return _text(tokens[: len(tokens) - apart], tokens[len(tokens) - apart :], {"sources": "given"})


def held_out_counts(request: Recovery) -> list[int]:
    """How many samples of each source are held out, at least one."""
    return [max(1, round(share * request.held_out)) for share in request.source_shares]


def _text(train: Tensor, held_out: Tensor, record: dict[str, Any]) -> Text:
    if not len(train) or not len(held_out):
        raise HywiaError(
            f"recover: text: expected at least five samples, one of them to judge by, got {len(train) + len(held_out)} "
            f"of {train.shape[1]} tokens; give more text, or shorter samples (seq_len)"
        )
    facts = {"samples": len(train), "held_out": len(held_out), "seq_len": train.shape[1], "sha256": digest(train)}
    return Text(train, held_out, {**record, **facts})
