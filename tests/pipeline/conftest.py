"""Fixtures over the tiny models, and a tokenizer that needs no files."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny import TINY, Tiny, fresh
from tests.support.tokenizers import byte_tokenizer


@pytest.fixture(params=TINY, ids=lambda t: t.name)
def tiny(request) -> Tiny:
    return request.param


@pytest.fixture
def model(tiny):
    return fresh(tiny)


@pytest.fixture
def gqa():
    return fresh(TINY[2])


@pytest.fixture
def tokens():
    return torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(7))


WAYS = (("autograd", "fast"), ("autograd", "lean"), ("fused", "fast"), ("fused", "lean"), ("fused", "layerwise"))


@pytest.fixture(params=WAYS, ids="-".join)
def way(request, monkeypatch) -> dict[str, str]:
    """Arguments of `calibrate` for each of its passes; layerwise in runs of one or two samples."""
    monkeypatch.setattr("hywia_kernels.engine.memory.CHUNK_TOKENS", 24)
    return {"engine": request.param[0], "memory": request.param[1]}


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A tiny grouped-query model on disk, as a user would have it."""
    folder = tmp_path / "model"
    fresh(TINY[2]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
