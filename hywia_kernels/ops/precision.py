"""Products of float32 matrices in full float32, whatever narrower type the process allows."""

from __future__ import annotations

from typing import Any

import torch

from .switch import Held, Switch

__all__ = ["full_float32"]


def _switch(settings: Any) -> Switch:
    """A switch that turns `fp32_precision` to full float32. The older flags (`allow_tf32`) are left alone: they follow
    `fp32_precision`, and raise where it is in use."""

    def read() -> tuple[str, bool]:
        before = settings.fp32_precision
        if before in ("none", "ieee"):
            return before, False
        # A setting that was never set shows what the wider setting says, and must go on following that one afterwards.
        try:
            settings.fp32_precision = "none"
            inherited = settings.fp32_precision == before
        finally:
            settings.fp32_precision = before
        return before, inherited

    def turn() -> None:
        if settings.fp32_precision not in ("none", "ieee"):
            settings.fp32_precision = "ieee"

    def restore(kept: tuple[str, bool]) -> None:
        before, inherited = kept
        if before not in ("none", "ieee"):
            settings.fp32_precision = "none" if inherited else before

    return Switch(read, turn, restore)


_BACKENDS: Any = torch.backends
_SWITCHES = {"cuda": _switch(_BACKENDS.cuda.matmul), "cpu": _switch(_BACKENDS.mkldnn.matmul)}


def full_float32(device: str) -> Held:
    """A context in which products on "cuda" or "cpu" devices use no narrower type inside, such as TF32 or bfloat16."""
    return _SWITCHES[device].held()
