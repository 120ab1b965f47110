"""What products of float32 matrices are made in, whatever the process allows: full float32, or TF32."""

from __future__ import annotations

from typing import Any

import torch

from .switch import Held, Switch

__all__ = ["full_float32", "multiplies_bfloat16", "tensor_float32", "tf32"]


_FULL = ("none", "ieee")


def _switch(settings: Any, wanted: str) -> Switch:
    """A switch that turns `fp32_precision` to "ieee" or "tf32". The older flags (`allow_tf32`) are left alone: they
    follow `fp32_precision`, and raise where it is in use."""

    def as_wanted(precision: str) -> bool:
        return precision == wanted or (wanted in _FULL and precision in _FULL)

    def read() -> tuple[str, bool]:
        before = settings.fp32_precision
        if as_wanted(before):
            return before, False
        # A setting that was never set shows what the wider setting says, and must go on following that one afterwards.
        try:
            settings.fp32_precision = "none"
            inherited = settings.fp32_precision == before
        finally:
            settings.fp32_precision = before
        return before, inherited

    def turn() -> None:
        if not as_wanted(settings.fp32_precision):
            settings.fp32_precision = wanted

    def restore(kept: tuple[str, bool]) -> None:
        before, inherited = kept
        if not as_wanted(before):
            settings.fp32_precision = "none" if inherited else before

    return Switch(read, turn, restore)


_BACKENDS: Any = torch.backends
_EXACT = {"cuda": _switch(_BACKENDS.cuda.matmul, "ieee"), "cpu": _switch(_BACKENDS.mkldnn.matmul, "ieee")}
_NARROW = _switch(_BACKENDS.cuda.matmul, "tf32")


def full_float32(device: str) -> Held:
    """A context in which products on "cuda" or "cpu" devices use no narrower type inside, such as TF32 or bfloat16."""
    return _EXACT[device].held()


def tensor_float32() -> Held:
    """A context in which products on CUDA devices are TF32's: eleven bits, summed in float32. For what needs no more,
    such as text that is drawn at random."""
    return _NARROW.held()


def tf32() -> bool:
    """Whether products on CUDA devices are TF32's now."""
    return bool(_BACKENDS.cuda.matmul.fp32_precision == "tf32")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrices in bfloat16 are multiplied faster than float32 ones on a device: by tensor cores, or by a CPU's
    matrix unit (Intel's AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # The check is torch's own, without a public name.
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and supported is not None and bool(supported())
