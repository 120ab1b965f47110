"""What a person calls the device that a figure was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

__all__ = ["device_name", "threaded_device_name"]


def device_name(device: torch.device | str) -> str:
    """Name of a GPU or of this machine's processor, e.g. "NVIDIA H100 80GB HBM3"; "cpu" where nobody tells."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    table = Path("/proc/cpuinfo")
    for line in table.read_text(errors="replace").splitlines() if table.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "cpu"


def threaded_device_name(device: torch.device | str) -> str:
    """The `device_name`, and for a processor the number of threads that torch uses, which its figures depend on."""
    name = device_name(device)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads != 1)}" if torch.device(device).type == "cpu" else name
