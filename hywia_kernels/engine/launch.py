"""Launches of Triton's kernels. The compiled kernel is looked up here, since Triton's own look-up takes longer than a
small kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.devices import on

__all__ = ["Launcher"]


class Launcher:
    """One kernel with its constants, which come last in its signature, and options.

    A compiled kernel serves all calls whose operands Triton would specialise alike. It goes by tensors' dtypes, whether
    they begin at multiples of 16 bytes, and integers' values; here all values are told apart, which is more than Triton
    does and never less.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        self.kernel, self.options = kernel, {**constants, **options}
        self.constants = tuple(constants.values())
        self._compiled: dict[tuple, Any] = {}

    def __call__(self, device: torch.device, programs: tuple[int, int], *operands: Any) -> None:
        key = (device, *(self._kind(x) for x in operands))
        compiled = self._compiled.get(key)
        with on(device):
            if compiled is not None:
                compiled[programs[0], programs[1], 1](*operands, *self.constants)
            else:  # Triton's interpreter returns None, and so always comes here
                self._compiled[key] = self.kernel[programs](*operands, **self.options)

    @staticmethod
    def _kind(operand: Any) -> Any:
        if isinstance(operand, Tensor):
            return operand.dtype, operand.data_ptr() % 16 == 0
        return operand
