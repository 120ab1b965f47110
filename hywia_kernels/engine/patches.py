"""A model for a while: without parameter gradients, with other `forward`s, under reproducible kernels."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["forward_replaced", "frozen", "reproducible", "without_collections"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def forward_replaced(replacements: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Give modules another `forward` for a while."""
    # Through the modules' dictionaries: their own attribute assignment takes longer than the launch of a kernel.
    before = [(vars(module), vars(module).get("forward")) for module, _ in replacements]
    try:
        for module, forward in replacements:
            vars(module)["forward"] = forward
        yield
    finally:
        for attributes, forward in reversed(before):
            if forward is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = forward


@contextmanager
def frozen(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Eval mode and no parameter gradients; both restored. `modules`: all of the model's, where they are at hand."""
    modules = list(model.modules() if modules is None else modules)
    training = [m for m in modules if m.training]
    learning = [p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad]
    try:
        # Through the dictionaries, as above.
        for module in training:
            vars(module)["training"] = False
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in training:
            vars(module)["training"] = True


class reproducible:
    """torch's deterministic kernels, where they matter: attention's backward adds atomically on CUDA otherwise.

    The attention kernels heed the strict mode alone ("warn only" leaves them as they are), and the strict mode wants
    cuBLAS's workspace named (the value is torch's own for Hopper; a user's is kept). With it named, torch parses it at
    every call of cuBLAS, for fifty microseconds: `cublas=False` leaves that out where nothing calls it. An op that has
    no deterministic kernel raises RuntimeError. Does nothing when `on` is False.
    """

    def __init__(self, on: bool, *, cublas: bool = True) -> None:
        self.on, self.cublas = on, cublas

    def __enter__(self) -> None:
        if not self.on:
            return
        filling: Any = torch.utils.deterministic
        self.mode, self.fill = torch.get_deterministic_debug_mode(), filling.fill_uninitialized_memory
        filling.fill_uninitialized_memory = False
        if self.cublas:
            self.workspace = os.environ.get(_CUBLAS)
            os.environ.setdefault(_CUBLAS, ":4096:8")
        # As `use_deterministic_algorithms(True)`, which would import the compiler, for a second, to tell it too.
        torch.set_deterministic_debug_mode("error")

    def __exit__(self, *error: object) -> None:
        if not self.on:
            return
        filling: Any = torch.utils.deterministic
        torch.set_deterministic_debug_mode(self.mode)
        filling.fill_uninitialized_memory = self.fill
        if self.cublas and self.workspace is None:
            os.environ.pop(_CUBLAS, None)


@contextmanager
def without_collections() -> Iterator[None]:
    """No cyclic garbage collection: one in the middle of a pass goes through everything that is imported, for up to a
    tenth of a second, and what a pass leaves is freed by reference counts."""
    enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if enabled:
            gc.enable()
