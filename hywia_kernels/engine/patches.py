"""What changes a model or the process for a while: no parameter gradients, other `forward`s, reproducible kernels."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from ..ops.switch import Switch

__all__ = [
    "STRICT",
    "WORKSPACE",
    "forward_replaced",
    "frozen",
    "hooked",
    "lacks_deterministic_kernel",
    "reproducible",
    "reproducibly",
    "unhook",
    "unpacked",
    "without_collections",
]

Result = TypeVar("Result")
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_FILLING: Any = torch.utils.deterministic
_OURS = "_hywia_hook"  # marks the hooks of this package


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
    """Eval mode and no parameter gradients for a while. `modules` are all of the model's, where they are at hand."""
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
        for module in training:
            vars(module)["training"] = True
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Any]], *, before: bool = False) -> Iterator[None]:
    """Forward hooks for a while, or, with `before`, hooks that are given what enters the module."""
    hooks = list(hooks)
    try:
        for module, hook in hooks:
            setattr(hook, _OURS, True)
            (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)
        yield
    finally:
        unhook(module for module, _ in hooks)


def unhook(modules: Iterable[nn.Module]) -> None:
    """Remove the hooks that `hooked` registered, and no others."""
    for module in modules:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, _OURS, False)]:
                hooks.pop(key, None)


def _read_strict() -> tuple[int, bool]:
    return torch.get_deterministic_debug_mode(), _FILLING.fill_uninitialized_memory


def _turn_strict() -> None:
    _FILLING.fill_uninitialized_memory = False
    # `use_deterministic_algorithms(True)` does the same, but imports the compiler to tell it too, which takes a second.
    torch.set_deterministic_debug_mode("error")


def _restore_strict(before: tuple[int, bool]) -> None:
    torch.set_deterministic_debug_mode(before[0])
    _FILLING.fill_uninitialized_memory = before[1]


def _restore_workspace(before: str | None) -> None:
    if before is None:
        os.environ.pop(_CUBLAS, None)


STRICT = Switch(_read_strict, _turn_strict, _restore_strict)
WORKSPACE = Switch(
    lambda: os.environ.get(_CUBLAS),
    lambda: os.environ.__setitem__(_CUBLAS, os.environ.get(_CUBLAS, ":4096:8")),
    _restore_workspace,
)


@contextmanager
def reproducible(on: bool, *, cublas: bool = True) -> Iterator[None]:
    """Makes torch use its deterministic kernels for a while; without them attention's backward adds atomically on CUDA.

    Only torch's strict mode makes the attention kernels deterministic; its "warn only" mode leaves them as they are.
    The strict mode wants cuBLAS's workspace named in the environment: the value set here is torch's own for Hopper, and
    a user's value is kept. While it is named, torch parses it at every call of cuBLAS, which takes fifty microseconds.
    `cublas=False` leaves it out where nothing calls cuBLAS. Autograd's own threads must ask for that, since the
    environment may not change while another thread reads it.

    Does nothing when `on` is False.

    Raises:
        RuntimeError: from inside, by an op that has no deterministic kernel.
    """
    if not on:
        yield
        return
    with WORKSPACE.held() if cublas else nullcontext(), STRICT.held():
        yield


def lacks_deterministic_kernel(error: RuntimeError) -> bool:
    """Whether an error is what torch's strict mode says of an op that has no deterministic kernel."""
    return "deterministic" in str(error)


def reproducibly(run: Callable[[bool], Result], cuda: bool) -> tuple[Result, bool]:
    """What `run` gives under deterministic kernels, or, where an op has none, without them; and which it was.

    Args:
        run: is told whether to ask for them (see `reproducible`), and may be called twice. cuda: whether it runs there;
            elsewhere all kernels are deterministic.
    """
    try:
        return run(cuda), True
    except RuntimeError as error:
        if not cuda or not lacks_deterministic_kernel(error):
            raise
    return run(False), False


@contextmanager
def without_collections() -> Iterator[None]:
    """No cyclic garbage collection for a while. A collection in the middle of a pass goes through everything that is
    imported, which takes up to a tenth of a second, and what a pass leaves is freed by reference counts anyway."""
    enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def unpacked() -> Iterator[None]:
    """Within the context transformers takes samples for whole ones, none of them packed beside another or padded.

    It looks at the positions to find that out, which it cannot do while a stream is captured: then it would make a mask
    where the causal kernel needs none, and layers compiled without one would be compiled again.
    """
    from transformers import masking_utils

    replacements = {"is_tracing": lambda tensor=None: False, "find_packed_sequence_indices": lambda position_ids: None}
    before = {name: vars(masking_utils)[name] for name in replacements if name in vars(masking_utils)}
    try:
        vars(masking_utils).update({name: replacements[name] for name in before})
        yield
    finally:
        vars(masking_utils).update(before)
