"""CUDA C++ kernels: hands pointers, sizes, strides and the current stream to the extension `hywia_kernels._cuda`."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .calls import BatchCall, LinearCall, TaylorCall
from .cuda_linear import prepared
from .devices import on, stream
from .native import ORDER_CODES, compact_sizes, extension, operand

OPS = ("taylor_importance", "linear_importance", "compact", "taylor_importance_batch")


def _extension() -> Any:
    return extension("_cuda")


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for `architectures` (CMake's notation, e.g. "80-real 90a-real 90-virtual") runs on a GPU.

    Machine code runs on the same major version with the same or a later minor one; code of an architecture-specific
    target ("90a") on that version alone; PTX on every version from its own on. A bare number stands for both kinds.
    """
    here = capability[0] * 10 + capability[1]
    for number, specific, kind in re.findall(r"(\d+)([af]?)(?:-(real|virtual))?", architectures):
        built = int(number)
        native = built // 10 == capability[0] and built <= here and kind != "virtual"
        ptx = built <= here and kind != "real" and not specific
        if specific == "a":
            native = ptx = here == built
        if native or ptx:
            return True
    return False


def has_hopper_code(architectures: str) -> bool:
    """Whether code with Hopper's own instructions was compiled: plain sm_90 code and PTX leave those kernels empty."""
    return any(name.startswith("90a") for name in re.split(r"[;\s]+", architectures))


@cache
def _uncovered(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    built = _extension().architectures
    if covers(built, capability):
        return None
    wanted = "{}{}".format(*capability)
    return (
        f"the CUDA extension was built for {built}, and GPU {device} ({torch.cuda.get_device_name(device)}) is "
        f"sm_{wanted}; reinstall with HYWIA_BUILD=cuda HYWIA_CUDA_ARCHITECTURES={wanted}"
    )


def unavailable() -> str | None:
    error = _extension()
    if isinstance(error, ModuleNotFoundError):
        return (
            "the CUDA extension was not built (HYWIA_BUILD=none or cpu, or no nvcc); reinstall with HYWIA_BUILD=cuda "
            "where nvcc is installed"
        )
    if isinstance(error, ImportError):
        return f"the CUDA extension does not load ({error}); reinstall with HYWIA_BUILD=cuda"
    if torch.version.cuda is None:
        return "this torch was built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    reason = error.probe()
    if reason:
        return f"the CUDA extension cannot start ({reason}); update the driver or reinstall with an older CUDA toolkit"
    uncovered = [_uncovered(device) for device in range(torch.cuda.device_count())]
    return uncovered[0] if all(uncovered) else None


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    present = [t for t in tensors if t is not None]
    device = present[0].device
    if device.type != "cuda":
        return f"it takes tensors on a GPU, got {device}"
    uncovered = _uncovered(device.index)
    if uncovered is None and op == "taylor_importance_batch":
        # Weight, gradient and Fisher information of each matrix in turn.
        for i, weight in enumerate(tensors[::3]):
            reason = _dtypes(weight, *tensors[3 * i + 1 : 3 * i + 3]) if weight is not None else None
            if reason is not None:
                return f"matrix {i}: {reason}"
    if uncovered is not None:
        return uncovered
    if op == "taylor_importance":
        return _dtypes(present[0], *tensors[1:])
    return _linear(*present) if op == "linear_importance" else None


def _dtypes(weight: Tensor, grad: Tensor | None = None, fisher: Tensor | None = None) -> str | None:
    """Why the kernels cannot take these dtypes, or None. Gradient and Fisher information are in the weight's dtype or
    in float32, and the Fisher information is no narrower than the gradient."""
    names = {"grad": grad, "fisher": fisher}
    for name, tensor in names.items():
        if tensor is not None and tensor.dtype not in (weight.dtype, torch.float32):
            return f"{name}: it takes {weight.dtype} (the weight's) or torch.float32, got {tensor.dtype}"
    if grad is not None and fisher is not None and fisher.dtype != grad.dtype and fisher.dtype != torch.float32:
        return f"fisher: it takes {grad.dtype} (the gradient's) or torch.float32, got {fisher.dtype}"
    return None


def _linear(grad_output: Tensor, input: Tensor, weight: Tensor, mapped: Tensor | None = None) -> str | None:
    """Why `linear_importance` cannot take these operands, or None: it needs Hopper's tensor cores and copy engine, and
    layouts that the copy engine reads."""
    capability = torch.cuda.get_device_capability(weight.device)
    if capability != (9, 0):
        return "its kernels use Hopper's own instructions and run on compute capability 9.0, got {}.{}".format(
            *capability
        )
    built = _extension().architectures
    if not has_hopper_code(built):
        return f"the CUDA extension was built for {built}, without 90a; reinstall with HYWIA_CUDA_ARCHITECTURES=90a"
    if weight.dtype == torch.float32:
        return "it takes torch.bfloat16 and torch.float16, got torch.float32"
    named = {"grad_output": grad_output, "input": input, "weight": weight, "mapped": mapped}
    for name, tensor in named.items():
        if tensor is None:
            continue
        row, column = tensor.stride()
        aligned = tensor.data_ptr() % 16 == 0 and (row % 8 == 0 or tensor.shape[0] == 1)
        if tensor.numel() and not ((column == 1 or tensor.shape[1] == 1) and row >= tensor.shape[1] and aligned):
            return (
                f"{name}: it takes contiguous rows that begin at multiples of 16 bytes, got strides {tensor.stride()}"
            )
    if grad_output.shape[0] >= 2**31 - 64:
        return f"grad_output: it takes fewer than 2^31 tokens, got {grad_output.shape[0]}"
    return None


_kept_counters: dict[tuple[int, int], Tensor] = {}


def _counters(device: int) -> Tensor:
    """int32 zeros with which the blocks of a launch find out which of them is the last; the kernels leave zeros behind.

    They are kept per stream, whose launches follow each other. A graph under capture gets its own, so that its replays
    do not share them with the launches of another stream; they are zeroed on every replay.
    """
    count = _extension().taylor_counters
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=f"cuda:{device}")
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _kept_counters:
        _kept_counters[key] = torch.zeros(count, dtype=torch.int32, device=f"cuda:{device}")
    return _kept_counters[key]


def _taylor_arguments(call: TaylorCall) -> dict[str, Any]:
    """The operands and sizes of a call, as the extension takes them."""
    axis = call.axis
    return {
        "weight": operand(call.weight, axis),
        "grad": operand(call.grad, axis),
        "fisher": operand(call.fisher, axis),
        "units": call.weight.shape[axis],
        "reduce": call.weight.shape[1 - axis],
        "group_size": call.group_size,
        "order": ORDER_CODES[call.order],
    }


def taylor_importance(call: TaylorCall, fine: Tensor, signed: Tensor, accumulate: bool) -> None:
    extension, device, arguments = _extension(), call.weight.device, _taylor_arguments(call)
    with on(device):
        # The caching allocator ties the workspace to the current stream, so it may be freed when this returns.
        floats = extension.taylor_importance_workspace(**arguments)
        workspace = torch.empty(floats, dtype=torch.float32, device=device)
        counters = _counters(device.index)
        extension.taylor_importance(
            **arguments,
            fine=fine.data_ptr(),
            signed_sum=signed.data_ptr(),
            accumulate=accumulate,
            workspace=workspace.data_ptr(),
            counters=counters.data_ptr(),
            stream=stream(device),
        )


def linear_importance(call: LinearCall, fine: Tensor, coarse: Tensor, accumulate: bool) -> None:
    prepared(call)(call, fine, coarse, accumulate)


# For callers with many matrices of a shape.
linear_importance.prepared = prepared  # type: ignore[attr-defined]


def compact(weight: Tensor, keep: Tensor, axis: int, out: Tensor) -> None:
    with on(weight.device):
        _extension().compact(
            weight=weight.data_ptr(),
            out=out.data_ptr(),
            keep=keep.data_ptr(),
            stream=stream(weight.device),
            **compact_sizes(weight, axis, out),
        )


def taylor_importance_batch(call: BatchCall, fine: list[Tensor], signed: list[Tensor], accumulate: bool) -> None:
    members, matrices, device = call.members, call.matrices, call.weights[0].device
    with on(device):
        left: list[int] = _extension().taylor_importance_batch(
            matrices=[
                (*(operand(x, m.axis) for x in m.operands), m.weight.shape[1 - m.axis], m.group_size)
                for listed in members
                for m in (matrices[i] for i in listed)
            ],
            results=[
                (f.data_ptr(), s.data_ptr(), f.numel(), len(listed), accumulate)
                for f, s, listed in zip(fine, signed, members, strict=True)
            ],
            order=ORDER_CODES[call.order],
            stream=stream(device),
        )
    for result in left:  # its matrices have a layout that the kernel cannot read in 16-byte words
        for number, i in enumerate(members[result]):
            taylor_importance(matrices[i], fine[result], signed[result], accumulate or number > 0)
