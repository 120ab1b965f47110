"""The grid of splits, and what searches choose of it."""

from __future__ import annotations

import json

import pytest
import torch

from hywia_kernels.method.reading import bundled_text
from tests.support.tiny import TINY, fresh
from tests.support.tokenizers import byte_tokenizer

from . import bench_search, rows


@pytest.mark.parametrize("recovered", [False, True])
def test_a_search_is_held_against_the_best_of_the_grid(tmp_path, recovered):
    text, calib, out = tmp_path / "text.txt", tmp_path / "calib.jsonl", tmp_path / "search.csv"
    text.write_text(bundled_text()[20_000:24_000])
    calib.write_text("".join(json.dumps({"text": bundled_text()[i : i + 400]}) + "\n" for i in range(0, 16_000, 400)))
    argv = ["--calib", str(calib), "--text", str(text), "--max-blocks", "8", "--block", "32", "--ratios", "0.3"]
    argv += ["--samples", "4", "--reconstruct-samples", "8", "--align", "8", "--device", "cpu", "--csv", str(out)]
    argv += ["--search", "none", "fast", *(["--recover-tokens", "4096"] if recovered else [])]
    torch.manual_seed(0)
    arguments = bench_search._arguments(argv)
    assert bench_search.run(arguments, fresh(TINY[2]), byte_tokenizer(), argv) == 0
    found = rows.read_rows(out, bench_search.COLUMNS)
    grid = [row for row in found if row.search == "grid"]
    assert len({(row.heads, row.channels, row.spread) for row in grid}) == len(grid) >= 4
    uniform = [row for row in grid if row.layout == "uniform"]
    searched = [row for row in found if row.search != "grid"]
    assert [(row.layout, row.search) for row in searched] == [
        (layout, search) for layout in ("uniform", "adaptive") for search in ("none", "fast")
    ]
    for row in searched:
        admitted = uniform if row.layout == "uniform" else grid
        assert row.of_best == pytest.approx(row.perplexity / min(r.perplexity for r in admitted), rel=1e-3)
        assert row.of_best >= 1.0
        if recovered:
            best = min(r.recovered for r in admitted)
            assert row.of_best_recovered == pytest.approx(row.recovered / best, rel=1e-3)
    if recovered:
        assert sum(row.recovered for row in grid) < sum(row.perplexity for row in grid)
        assert {row.recover_tokens for row in found} == {4096}
    else:
        assert {row.recovered for row in found} == {None}
