"""Models that accelerate spread over devices (`device_map`): hooks that move what enters a module to its weights.

accelerate gives every module a `forward` of its own, which hides from the engine what it knows how to run as one node.
Inside of a decoder layer whose parts are all on one device there is nothing to move, so a pass leaves those forwards
out; at the layer's door what enters is moved as accelerate would. Modules whose weights the hooks load and drop again
(offloaded ones) are another matter: `check_held` refuses them by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["entering_device", "moved", "run_plainly"]


def entering_device(module: nn.Module) -> torch.device | None:
    """The device to which accelerate moves what enters a module; None where its `forward` is the module's own, or does
    anything else."""
    own = vars(module)
    forward, before = own.get("forward"), own.get("_old_forward")
    if forward is None or before is None or getattr(forward, "__wrapped__", None) is not before:
        return None
    if getattr(before, "__func__", None) is not type(module).forward:
        return None  # there was another one before accelerate's
    outer: Any = own.get("_hf_hook")
    hooks: list[Any] = list(getattr(outer, "hooks", (outer,)))
    devices = set()
    for hook in hooks:
        kind = type(hook)
        if kind.__name__ != "AlignDevicesHook" or not kind.__module__.startswith("accelerate."):
            return None
        if hook.offload or hook.io_same_device or hook.execution_device is None:
            return None
        devices.add(_device(hook.execution_device))
    return devices.pop() if len(devices) == 1 else None


def _device(named: Any) -> torch.device:
    return torch.device("cuda", named) if isinstance(named, int) else torch.device(named)


def run_plainly(modules: Mapping[str, nn.Module]) -> None:
    """Take accelerate's forwards off the modules inside of decoder layers, each of which is on one device.

    Args:
        modules: all of a model's, by name. Whoever runs a pass puts their forwards back.
    """
    if not any("_hf_hook" in vars(module) for module in modules.values()):
        return
    inside: dict[str, list[nn.Module]] = {}
    for name, module in modules.items():
        for item in _items(name, modules):
            if item != name:
                inside.setdefault(item, []).append(module)
            break  # the outermost list's
    for item, parts in inside.items():
        device = entering_device(modules[item])
        hooked = [part for part in parts if "_hf_hook" in vars(part)]
        held = {p.device for part in parts for p in part._parameters.values() if p is not None}
        if device is None or held - {device} or any(entering_device(part) != device for part in hooked):
            continue
        for part in hooked:
            vars(part).pop("forward")


def _items(name: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The items of lists that a module is or lies in, the outermost first."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        above = modules.get(".".join(parts[: end - 1]))
        if isinstance(above, nn.ModuleList):
            yield ".".join(parts[:end])


def moved(value: Any, device: torch.device) -> Any:
    """An argument of a layer, its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(moved(part, device) for part in value)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    return value
