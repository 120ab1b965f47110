"""How a scoring is streamed and shared, and where the weights stay, by what is free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.loading import device_named
from ..engine.host import free_on_host
from ..errors import UsageError
from .launch import launched_ranks
from .ranks import Ranks

__all__ = ["Streaming", "device_of_rank", "place_for"]

_BESIDE, _LEAST_BESIDE = 0.1, 2 << 30  # of the weights' bytes, or at all: room on the device for a run of samples
_HOST_SHARE = 0.8  # of the host's free memory, for weights


@dataclass(frozen=True)
class Streaming:
    """A scoring that is streamed.

    Attributes:
        ranks: the processes that share it. device: this one's. weights: where they stay, one of WEIGHTS.
        work: the folder that a stopped one leaves.
    """

    ranks: Ranks
    device: torch.device
    weights: str
    work: Path | None = None


def device_of_rank(device: str) -> torch.device:
    """The device of this process, of those that torchrun started on this host.

    Args:
        device: as the commands take it: "auto" and "cuda" are the CUDA device of the process's number.

    Raises:
        UsageError: an unknown device, one that was named for several processes, or fewer devices than processes.
    """
    _, size, local = launched_ranks()
    named = device_named(device)
    if size == 1 or named.type == "cpu":
        return named
    if named.index is not None:
        raise UsageError(
            f"device: expected auto, cpu or cuda for {size} processes, which take one device each, got {device!r}"
        )
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"device: process {local} of this host has no CUDA device, there are {torch.cuda.device_count()}; start "
            "torchrun with --nproc_per_node of that number"
        )
    return torch.device("cuda", local)


def free_on(device: torch.device) -> int:
    """Bytes that are free on a device; of the host, this process's share of what it may give to weights."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(_HOST_SHARE * free_on_host() / processes_here())


def processes_here() -> int:
    """How many processes torchrun started on this host."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(here) if here.isdigit() else 1)


def place_for(weight_bytes: int | None, device: torch.device, *, shared: bool = False) -> str:
    """Where weights of so many bytes stay: on the device, in the host's memory, or in their files. Unknown bytes (of a
    hub model that is not here yet) are taken to fit.

    On a CPU the device is the host's memory, where each process has weights of its own; pages of files are shared.

    Args:
        shared: the processes of a host hold them together in its memory.
    """
    if weight_bytes is None:
        return "device"
    beside = max(_LEAST_BESIDE, int(_BESIDE * weight_bytes)) if device.type == "cuda" else 0
    if weight_bytes + beside <= free_on(device):
        return "device"
    own = -(-weight_bytes // processes_here()) if shared else weight_bytes
    return "host" if device.type == "cuda" and own <= free_on(torch.device("cpu")) else "files"
