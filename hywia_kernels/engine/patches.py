"""A model for a while: without parameter gradients, with other `forward`s, under reproducible kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["forward_replaced", "frozen", "reproducible"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def forward_replaced(replacements: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Give modules another `forward` for a while."""
    before = [(module, module.__dict__.get("forward")) for module, _ in replacements]
    try:
        for module, forward in replacements:
            module.forward = forward
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients; both restored."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextmanager
def reproducible(on: bool) -> Iterator[None]:
    """torch's deterministic kernels, where they matter: attention's backward adds atomically on CUDA otherwise.

    The attention kernels heed the strict mode alone ("warn only" leaves them as they are), and the strict mode wants
    cuBLAS's workspace named (the value is torch's own for Hopper; a user's is kept). An op that has no deterministic
    kernel raises RuntimeError. Does nothing when `on` is False.
    """
    if not on:
        yield
        return
    filling: Any = torch.utils.deterministic
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, workspace = filling.fill_uninitialized_memory, os.environ.get(_CUBLAS)
    try:
        filling.fill_uninitialized_memory = False
        os.environ.setdefault(_CUBLAS, ":4096:8")
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        filling.fill_uninitialized_memory = fill
        if workspace is None:
            os.environ.pop(_CUBLAS, None)
