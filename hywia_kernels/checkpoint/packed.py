"""How many weights a model has where several are stored in one number."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

__all__ = ["count_weights"]

_PACKED = ("qweight", "weight_packed", "weight")  # GPTQ and AWQ, compressed-tensors, the rest


def count_weights(model: nn.Module) -> int:
    """Weights of the whole model, tied ones once; a packed number counts as the weights it holds.

    A linear layer whose matrix is stored as whole numbers (bitsandbytes' 4 bits, GPTQ, AWQ, compressed-tensors) counts
    `in_features · out_features`; scales, zeros and indices beside it are no weights.
    """
    total, counted = 0, set()
    for module in model.modules():
        packed = _packed(module)
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in counted:
                continue
            counted.add(id(parameter))
            if packed == name:
                total += _weight_count(module, parameter)
            elif packed is None or name == "bias":
                total += parameter.numel()
        if packed is not None and packed in module._buffers:
            total += _weight_count(module, module._buffers[packed])
            bias = module._buffers.get("bias")
            total += bias.numel() if bias is not None else 0
    return total


def _packed(module: nn.Module) -> str | None:
    """The name of a module's packed matrix."""
    for name in _PACKED:
        tensor: Any = module._parameters.get(name)
        tensor = module._buffers.get(name) if tensor is None else tensor
        if tensor is None:
            continue
        if getattr(tensor, "quant_state", None) is not None:
            return name
        whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
        if whole and _features(module) is not None:
            return name
    return None


def _features(module: Any) -> tuple[int, int] | None:
    """`(inputs, outputs)` of a linear layer by its attributes; None where it has none."""
    names = (("in_features", "out_features"), ("infeatures", "outfeatures"))
    for into, out in names:
        inputs, outputs = getattr(module, into, None), getattr(module, out, None)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return inputs, outputs
    return None


def _weight_count(module: nn.Module, tensor: Any) -> int:
    """How many weights a packed tensor of a module stands for."""
    state = getattr(tensor, "quant_state", None)
    shape = getattr(state, "shape", None)
    features = _features(module)
    if shape is not None:
        return math.prod(shape)
    return math.prod(features) if features is not None else tensor.numel()
