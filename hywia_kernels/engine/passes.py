"""What every pass over a model runs in: alone in the process, in torch's plain modes, the model left as it was.

A pass replaces forwards, freezes parameters and turns settings of the whole process; each is put back by whoever turned
it. Beside that, `apart` remembers all of it when the pass begins and puts it back when it ends, so that an interrupt in
the middle of putting one thing back cannot leave another.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .dispatched import run_plainly
from .patches import STRICT, WORKSPACE, unhook
from .rotary import REPLACED

__all__ = ["apart", "plain_modes", "put_back"]

_LOCK = threading.RLock()
_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
_COMPILED = "_compiled_call_impl"  # set by `module.compile()`: calls compiled code, which ignores a replaced `forward`
_SWITCHES: tuple[Any, ...] = (STRICT, WORKSPACE, REPLACED)


class _Before:
    """The state before a pass of all that it may change. Parameters' values and gradients are not among it."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        own = [vars(module) for module in modules.values()]
        parameters = {id(p): p for attributes in own for p in attributes["_parameters"].values() if p is not None}
        self.modules = modules
        self.parameters = [p for p in parameters.values() if p.requires_grad]
        self.training = [attributes for attributes in own if attributes["training"]]
        self.forwards = [(attributes, attributes.get("forward")) for attributes in own]
        self.compiled = [(attributes, attributes[_COMPILED]) for attributes in own if attributes.get(_COMPILED)]
        self.holders = [switch.holders() for switch in _SWITCHES]
        self.collecting = gc.isenabled()
        self.dtype = torch.get_default_dtype()

    def freeze(self) -> None:
        # Through the modules' dictionaries: their own attribute assignment takes longer than the launch of a kernel.
        for attributes in self.training:
            attributes["training"] = False
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        for attributes, _ in self.compiled:
            attributes[_COMPILED] = None

    def restore(self) -> None:
        """Puts all of it back; when interrupted it can be called again, and comes to the same end."""
        torch.set_default_dtype(self.dtype)
        for switch, holders in zip(_SWITCHES, self.holders, strict=True):
            switch.settle(holders)
        if self.collecting:
            gc.enable()
        for attributes, forward in self.forwards:
            if attributes.get("forward") is not forward:
                if forward is None:
                    attributes.pop("forward", None)
                else:
                    attributes["forward"] = forward
        for attributes in self.training:
            attributes["training"] = True
        for attributes, compiled in self.compiled:
            attributes[_COMPILED] = compiled
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        unhook(self.modules.values())


class _Net:
    """Context manager that calls `restore` when it is left, unless that was done already."""

    def __init__(self, restore: Callable[[], None], done: list[bool]) -> None:
        self._restore, self._done = restore, done

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        if not self._done:
            self._restore()
            self._done.append(True)


@contextmanager
def put_back(restore: Callable[[], None]) -> Iterator[None]:
    """Calls `restore` at the end, and makes sure that it is completed even when an interrupt comes in the middle of it:
    then the second net calls it again. So `restore` must bear to be stopped anywhere and begun anew."""
    done: list[bool] = []
    with _Net(restore, done), _Net(restore, done):
        yield


@contextmanager
def _alone() -> Iterator[None]:
    """Makes this the only pass of the process: other threads wait, and a thread may begin a pass inside its own."""
    held: list[bool] = []

    def let_go() -> None:
        _LOCK.release() if held and held.pop() else None  # on one line: neither twice nor not at all

    with put_back(let_go):
        held.append(_LOCK.acquire())
        yield


@contextmanager
def apart(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The surroundings of a pass over a model: eval mode, no parameter gradients, no compiled calls and no autocast, so
    that the caller's modes do not change its results.

    One pass at a time runs in a process: a second thread waits, since settings of the whole process are turned. While
    it runs, nobody else may use the model.

    Args:
        modules: all of the model's, by name.
    """
    with _alone():
        before = _Before(modules)
        with put_back(before.restore), ExitStack() as modes:
            _plain_modes(modes)
            if before.dtype != torch.float32:
                torch.set_default_dtype(torch.float32)
            before.freeze()
            run_plainly(modules)
            yield


@contextmanager
def plain_modes() -> Iterator[None]:
    """The modes of `apart` alone, for changes to a model: new parameters must not be inference tensors, say, or land on
    the caller's default device."""
    with _alone(), ExitStack() as modes:
        _plain_modes(modes)
        yield


def _plain_modes(modes: ExitStack) -> None:
    """Leaves those of the thread's modes that would change what is computed. Each is looked at first, which takes a
    microsecond, because some of the contexts slow every call of torch's down."""
    if torch.is_inference_mode_enabled():  # nothing made in it could be saved for backward
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())  # as in inference mode; passes ask for gradients where they want them
    for device in _DEVICE_TYPES:
        if torch.is_autocast_enabled(device):
            modes.enter_context(torch.autocast(device, enabled=False))
    if torch.get_default_device().type != "cpu":
        modes.enter_context(torch.device("cpu"))
    if torch.is_anomaly_enabled():  # a float16 pass detects overflow itself, and tries again with a smaller scale
        anomaly: Any = torch.autograd.set_detect_anomaly(False)
        modes.enter_context(anomaly)
