"""Facts about a model's weights: how many, how large, which, and whether they are numbers."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from .errors import HywiaError

__all__ = ["check_finite", "count_parameters", "fingerprint", "identity", "weight_bytes"]


def count_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes the parameters take in their present dtype, tied ones once: a safetensors checkpoint less its header."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def fingerprint(model: nn.Module, per_tensor: int = 1024) -> str:
    """sha256 over names, shapes and an even sample of every parameter's values.

    The values are taken as float32, so that an exact change of dtype keeps the fingerprint; reads `per_tensor` values
    a parameter, not the whole model, and waits once a device.
    """
    return identity(model, per_tensor)[0]


@torch.no_grad()
def identity(model: nn.Module, per_tensor: int = 1024) -> tuple[str, int]:
    """`(fingerprint, count_parameters)` from one walk over the model."""
    found: list[tuple[str, tuple[int, ...], torch.device, int]] = []
    values: dict[torch.device, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        # A view, so that one concatenation a device is all that has to be launched; made in one step where it can be.
        count, step = parameter.numel(), max(1, parameter.numel() // per_tensor)
        if parameter.is_contiguous():
            size = min(per_tensor, -(-count // step))
            sample = parameter.as_strided((size,), (step,), parameter.storage_offset())
        else:
            sample = parameter.reshape(-1)[::step][:per_tensor]
        values.setdefault(parameter.device, []).append(sample)
        found.append((name, tuple(parameter.shape), parameter.device, sample.numel()))
    digest = hashlib.sha256()
    host = {
        device: iter(torch.cat(parts).float().cpu().split([n for *_, d, n in found if d == device]))
        for device, parts in values.items()
    }
    for name, shape, device, _ in found:
        digest.update(f"{name}{shape}".encode())
        digest.update(next(host[device]).contiguous().numpy().tobytes())
    return digest.hexdigest(), sum(math.prod(shape) for _, shape, *_ in found)


def check_finite(model: nn.Module) -> None:
    """Raise HywiaError naming the first parameter that holds NaN or Inf."""
    for name, parameter in model.named_parameters():
        # One float32 sum first: it is finite for every healthy tensor and needs no mask as large as the weight.
        if torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
            continue
        finite = torch.isfinite(parameter.detach())
        if not bool(finite.all()):
            bad = int(finite.numel() - finite.sum())
            raise HywiaError(
                f"{name}: expected finite weights, found {bad} of {finite.numel()} NaN or Inf; "
                "the checkpoint is damaged, or its dtype overflowed: load it again, in float32 or bfloat16"
            )
