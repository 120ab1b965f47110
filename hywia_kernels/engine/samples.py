"""The calibration set as the passes take it: padded rows, their lengths, and runs of rows computed together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError

__all__ = ["Samples", "padded"]


@dataclass(frozen=True)
class Samples:
    """Some samples of the set, padded on the right. Under a causal mask the padding changes nothing, and the gradients
    at it are zero.

    Attributes:
        tokens: int64 `[samples, longest]`, on the CPU.
        lengths: int64 `[samples]`.
        index: int64 `[samples]`, the samples' places in the whole set.
    """

    tokens: Tensor
    lengths: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def longest(self) -> int:
        return self.tokens.shape[1]

    @property
    def total(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())

    @property
    def ragged(self) -> bool:
        return self.total < self.tokens.numel()

    def offsets(self) -> list[int]:
        """Where each sample begins among the tokens without padding, and where the last ends."""
        return list(itertools.accumulate(self.lengths.tolist(), initial=0))

    def rows(self) -> Tensor:
        """int64 positions of real tokens among the flattened `[samples · longest]`."""
        return (torch.arange(self.longest) < self.lengths[:, None]).reshape(-1).nonzero()[:, 0]

    def sorted(self) -> Samples:
        """The samples by length, so that neighbours need little padding; equally long ones keep their order."""
        order = torch.sort(self.lengths, stable=True).indices
        return Samples(self.tokens[order], self.lengths[order], self.index[order])

    def chunks(self, most_tokens: int) -> list[Samples]:
        """Consecutive runs of at most `most_tokens` tokens, padding included, or of one sample that is longer."""
        runs: list[Samples] = []
        start = 0
        for end in range(1, len(self) + 1):
            longest = int(self.lengths[start : end + 1].max())
            if end == len(self) or (end + 1 - start) * longest > most_tokens:
                part = slice(start, end)
                longest = int(self.lengths[part].max())
                runs.append(Samples(self.tokens[part, :longest], self.lengths[part], self.index[part]))
                start = end
        return runs


def padded(batches: Tensor | Sequence[Tensor]) -> Samples:
    """The calibration set from token ids: one tensor `[samples, length]` or `[length]`, or a sequence of such.

    Raises:
        UsageError: `batches` is something else, holds no samples, or one of fewer than two tokens.
    """
    rows: list[Tensor] = []
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        if not isinstance(batch, Tensor) or batch.dim() not in (1, 2) or batch.is_floating_point():
            raise UsageError("batches: expected int64 token ids [samples, length], or a sequence of such")
        rows += list(batch.cpu().long().reshape(-1, batch.shape[-1]))
    if not rows:
        raise UsageError("batches: expected at least one sample, got none")
    lengths = torch.tensor([r.numel() for r in rows])
    if int(lengths.min()) < 2:
        raise UsageError("batches: expected samples of at least 2 tokens (a next-token loss needs two)")
    return Samples(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, torch.arange(len(rows)))
