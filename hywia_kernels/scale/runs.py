"""The calibration set in runs that go through a layer together.

A matrix product of another size may take another kernel, which rounds differently. So runs are cut by the model and the
set alone, never by the number of processes, the memory or the device that happen to be there.
"""

from __future__ import annotations

import torch

from ..engine.samples import Samples

__all__ = ["LEAST", "MOST", "dealt", "runs_of"]

LEAST, MOST = 8, 64  # runs; a multiple of LEAST, so that 2, 4 or 8 processes have equally much to do
_WORK = 4e11  # a layer's parameters times a run's tokens: some 6 ms of an H100, more than the host takes to launch it
_MOST_TOKENS = 32768  # of a run, whose activations are in memory at a time; more runs than MOST are made then


def runs_of(samples: Samples, layer_parameters: int) -> list[Samples]:
    """Consecutive parts of the samples, sorted by length so that neighbours need little padding.

    Their number is a multiple of eight where there are as many samples: as many as leave a run `_WORK`, at least LEAST
    and at most MOST. Sizes differ by one at the most.

    Args:
        layer_parameters: of the largest decoder layer.
    """
    ordered = samples.sorted() if samples.ragged else samples
    count = len(ordered)
    mean = max(1.0, samples.total / count)
    together = max(1, round(_WORK / max(layer_parameters, 1) / mean))
    wanted = min(MOST, max(LEAST, count // together // LEAST * LEAST))
    needed = -(-count * samples.longest // _MOST_TOKENS)
    wanted = min(count, max(wanted, -(-needed // LEAST) * LEAST))
    runs, start = [], 0
    for i in range(wanted):
        end = start + count // wanted + (1 if i < count % wanted else 0)
        part = slice(start, end)
        longest = int(ordered.lengths[part].max())
        runs.append(Samples(ordered.tokens[part, :longest], ordered.lengths[part], ordered.index[part]))
        start = end
    assert torch.cat([run.index for run in runs]).numel() == count
    return runs


def dealt(runs: int, rank: int, ranks: int) -> list[int]:
    """The runs that a process takes; one process of several may have none."""
    return list(range(rank, runs, ranks))
