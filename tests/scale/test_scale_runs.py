"""How a set falls into runs: by the model and the set alone."""

from __future__ import annotations

import pytest
import torch

from hywia_kernels.engine.samples import padded
from hywia_kernels.scale.runs import dealt, runs_of

LLAMA_7B, LLAMA_70B = 202_383_360, 855_654_400  # parameters of a layer


@pytest.mark.parametrize(
    ("parameters", "samples", "runs", "largest"),
    [
        (LLAMA_7B, 128, 8, 16),
        (LLAMA_7B, 96, 8, 12),
        (LLAMA_70B, 96, 24, 4),
        (LLAMA_70B, 1024, 64, 16),
        (3_500_000, 96, 8, 12),
        (LLAMA_70B, 3, 3, 1),
        (3_500_000, 8192, 32, 256),
        (3_500_000, 32768, 128, 256),  # 32,768 tokens, the most that go through a layer together
        (LLAMA_7B, 11, 8, 2),
    ],
)
def test_numbers_of_runs(parameters, samples, runs, largest):
    made = runs_of(padded(torch.ones(samples, 128, dtype=torch.int64)), parameters)
    assert (len(made), max(map(len, made))) == (runs, largest)
    assert max(map(len, made)) - min(map(len, made)) <= 1
    assert torch.cat([run.index for run in made]).tolist() == list(range(samples))


def test_ragged_samples_lie_with_their_like():
    lengths = [5 + 7 * i % 23 for i in range(20)]
    samples = padded([torch.arange(2, 2 + n) for n in lengths])
    made = runs_of(samples, 1000)
    assert sorted(torch.cat([run.index for run in made]).tolist()) == list(range(20))
    assert [n for run in made for n in run.lengths.tolist()] == sorted(lengths)
    assert all(run.longest == int(run.lengths.max()) for run in made)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_run_is_dealt_once(ranks):
    parts = [dealt(24, rank, ranks) for rank in range(ranks)]
    assert sorted(run for part in parts for run in part) == list(range(24))
    assert max(map(len, parts)) - min(map(len, parts)) == 0
    assert dealt(3, 3, 4) == []
