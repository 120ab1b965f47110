"""Facts about a model's weights: how many, how large, which, and whether they are numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

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
def identity(
    model: nn.Module, per_tensor: int = 1024, modules: Mapping[str, nn.Module] | None = None
) -> tuple[str, int]:
    """`(fingerprint, count_parameters)` from one walk over the model, or none where its modules are given by name."""
    found: list[tuple[str, torch.device, int]] = []
    values: dict[torch.device, list[torch.Tensor]] = {}
    seen: set[int] = set()
    total = 0
    # As `named_parameters`, which takes as long to walk as the rest of this.
    for prefix, module in (dict(model.named_modules()) if modules is None else modules).items():
        for own, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            count = parameter.numel()
            step = max(1, count // per_tensor)
            size = min(per_tensor, -(-count // step))
            # A view, so that one concatenation a device is all that has to be launched; made in one step where it can.
            if parameter.is_contiguous():
                sample = parameter.as_strided((size,), (step,), parameter.storage_offset())
            else:
                sample = parameter.reshape(-1)[::step][:size]
            device = parameter.device
            values.setdefault(device, []).append(sample)
            name = f"{prefix}.{own}" if prefix else own
            found.append((f"{name}{tuple(parameter.shape)}", device, size))
            total += count
    # Bytes of all samples of a device, in which each parameter's lie one after the other.
    host = {device: torch.cat(parts).float().cpu().numpy().data.cast("B") for device, parts in values.items()}
    at = dict.fromkeys(host, 0)
    digest = hashlib.sha256()
    for described, device, size in found:
        begin, at[device] = at[device], at[device] + 4 * size
        digest.update(described.encode())
        digest.update(host[device][begin : at[device]])
    return digest.hexdigest(), total


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
