"""Before anything imports Triton: without a GPU its kernels run in the interpreter, on CPU tensors."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.append(str(Path(__file__).with_name("ops")))  # `operands` and `tolerances` serve the GPU tests as well


@pytest.fixture(autouse=True)
def _no_backend_from_the_environment(monkeypatch):
    """The caller's own HYWIA_BACKEND must not decide what is tested."""
    monkeypatch.delenv("HYWIA_BACKEND", raising=False)
