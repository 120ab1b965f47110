"""Figures on paper are what their formulas say, and the models' sizes what was published."""

from __future__ import annotations

import pytest

from . import scale_paper as paper


def test_the_models_are_as_published():
    for model, billions in ((paper.LLAMA_7B, 6.738), (paper.LLAMA_70B, 69.0), (paper.LLAMA_405B, 405.9)):
        whole = model.all_layers + 2 * model.vocabulary * model.hidden
        assert whole / 1e9 == pytest.approx(billions, rel=5e-3)
    assert paper.LLAMA_70B.layer == 855_654_400
    assert 58 * paper.DEEPSEEK_671B.layer < paper.DEEPSEEK_671B.all_layers < 61 * paper.DEEPSEEK_671B.layer


def test_the_larger_of_compute_and_transfer():
    """70B on one GPU from pinned memory: twice 136.9 GB at 50 GB/s, an eighth of it for each of eight."""
    rate = paper.rate_of(1.0, 100, 128)
    few, many = (paper.cost(paper.Case(paper.LLAMA_70B, 1, 1, "host", samples), rate) for samples in (10, 1000))
    assert few.transfer == many.transfer == pytest.approx(5.476, rel=1e-3)
    parameters = 80 * 855_654_400 + 32000 * 8192, 6_476_267_520 + 32000 * 4096
    assert many.compute == pytest.approx(10 * parameters[0] / parameters[1], rel=1e-6)
    assert (few.seconds, many.seconds) == (few.transfer, many.compute)
    eight = paper.cost(paper.Case(paper.LLAMA_70B, 8, 1, "host", 1000), rate)
    assert eight.compute == many.compute / 8
    assert eight.transfer == pytest.approx(273.8e9 / 8 / 50e9 + 273.8e9 * 7 / 8 / 450e9, rel=1e-3)
    assert (eight.host, eight.hidden) == (many.host, many.hidden / 8)
    disk = paper.cost(paper.Case(paper.LLAMA_70B, 8, 1, "files", 1000), rate)
    assert disk.transfer == pytest.approx(2 * 136.9e9 / 7e9, rel=1e-3)


def test_what_a_process_holds():
    """Embedding and head of 32,000 times 8,192, and two layers; hidden states of 82 times the tokens."""
    of = paper.cost(paper.Case(paper.LLAMA_70B, 1, 1, "files", 96), 0.0)
    assert of.weights == 2 * 2 * (32000 * 8192 + 855_654_400)
    assert of.hidden == 96 * 128 * 8192 * 2 * 82
