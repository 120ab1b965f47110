"""Products of float32 matrices in float32, whatever the process allows."""

from __future__ import annotations

from typing import Any

import torch

from .switch import Held, Switch

__all__ = ["full_float32"]


def _switch(settings: Any) -> Switch:
    """torch's present setting alone is read and written: the older flags (`allow_tf32`) raise where that one is in use,
    and follow it where they are."""

    def read() -> tuple[str, bool]:
        before = settings.fp32_precision
        if before in ("none", "ieee"):
            return before, False
        # One that was never set shows what the wider setting says, and must go on following that.
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
    """Context: products on "cuda" or "cpu" devices use no narrower type inside (TF32, bfloat16); left as it was."""
    return _SWITCHES[device].held()
