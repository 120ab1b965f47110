"""`linear_importance` by CUDA: what is the same for all matrices of a shape is made once, and only addresses change."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .calls import LinearCall
from .devices import offsets_on, on, stream
from .native import DTYPE_CODES, ORDER_CODES, extension

__all__ = ["Prepared", "prepared", "shape_of"]

ORDERS = {**ORDER_CODES, "all": 3}

_TABLE_BYTES = 512 << 20  # the most that the clusters' partial sums may take


def _pitch(tensor: Tensor) -> int:
    """Elements from one row to the next. The stride of a single row means nothing, and may be unaligned."""
    return tensor.stride(0) if tensor.shape[0] > 1 else -(-tensor.shape[1] // 8) * 8


@lru_cache(maxsize=64)
def _equal(offsets: tuple[int, ...]) -> bool:
    tokens, samples = offsets[-1], len(offsets) - 1
    return tokens % samples == 0 and offsets == tuple(range(0, tokens + 1, tokens // samples))


def shape_of(call: LinearCall) -> Any:
    """The extension's arguments of a call, but for its addresses. Needs no device."""
    grad_output, input, weight, offsets, axis, order, group_size, per_sample, scale, mapped = call
    return extension("_cuda").LinearImportance(
        strides=[0 if t is None else _pitch(t) for t in (grad_output, input, weight, mapped)],
        mapped=mapped is not None,
        dtype=DTYPE_CODES[weight.dtype],
        tokens=offsets[-1],
        rows=weight.shape[0],
        columns=weight.shape[1],
        ragged=not _equal(tuple(offsets)),
        samples=call.samples,
        axis=axis,
        order=ORDERS[order],
        group_size=group_size,
        per_sample=per_sample,
        scale=scale,
        table_bytes=_TABLE_BYTES,
    )


@dataclass(frozen=True)
class Prepared:
    """Scores every matrix of one call's shapes, strides and settings.

    Attributes:
        shape: the extension's arguments but for the addresses. floats: of its workspace.
        offsets: the samples' limits on the device; None: they are equally long.
    """

    device: torch.device
    shape: Any
    floats: int
    offsets: Tensor | None

    def __call__(self, call: LinearCall, fine: Tensor, coarse: Tensor, accumulate: bool) -> None:
        mapped = call.mapped
        with on(self.device):
            # The caching allocator ties the workspace to the current stream, so it may be freed when this returns.
            workspace = torch.empty(self.floats, dtype=torch.float32, device=self.device)
            self.shape.run(
                call.grad_output.data_ptr(),
                call.input.data_ptr(),
                call.weight.data_ptr(),
                0 if mapped is None else mapped.data_ptr(),
                0 if self.offsets is None else self.offsets.data_ptr(),
                fine.data_ptr(),
                coarse.data_ptr(),
                accumulate,
                workspace.data_ptr(),
                stream(self.device),
            )


def prepared(call: LinearCall) -> Prepared:
    device, limits = call.weight.device, tuple(call.offsets)
    shape = shape_of(call)
    with on(device):
        floats = shape.workspace()
        offsets = None if _equal(limits) or not call.per_sample else offsets_on(device, limits)
    return Prepared(device, shape, floats, offsets)
