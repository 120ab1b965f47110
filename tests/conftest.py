"""Before anything imports Triton: without a GPU its kernels run in the interpreter, on CPU tensors."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def threads():
    """Sets the number of torch's threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_backend_from_the_environment(monkeypatch):
    """The caller's own HYWIA_BACKEND must not decide what is tested."""
    monkeypatch.delenv("HYWIA_BACKEND", raising=False)
