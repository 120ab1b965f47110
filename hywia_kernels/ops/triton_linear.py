"""Launches the Triton kernels of `linear_importance`: cuts the work, and picks the configuration.

Bits: the same input gives the same bits for one configuration. Which one is taken depends on the call and on whether
the device has what Hopper has, never on a measurement, unless HYWIA_AUTOTUNE=1 asks for one (see `linear_configs`).

Operands go through tensor descriptors where the device has them and samples are whole steps of one length; ragged or
odd samples go through pointers, which is 1.4 to 1.8 times as slow. Rows that are not whole 16-byte pieces (an odd
width, a transposed view) are copied into ones that are, once a call.
"""

from __future__ import annotations

import functools
import os
import statistics

import torch
import triton
from torch import Tensor

from . import kernels_triton_linear as kernels
from . import linear_configs as configs
from .calls import LinearCall
from .devices import offsets_on
from .linear_configs import Config
from .linear_cut import Cut, cut, form_of, longest

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # pointers serve as well
    TensorDescriptor = None


def _aligned(operand: Tensor) -> bool:
    """Whether rows consist of whole 16-byte pieces, as descriptors and wide loads need."""
    size = operand.element_size()
    row = operand.stride(0) * size
    sizes = max(operand.shape) < 1 << 31
    return operand.stride(1) == 1 and row % 16 == 0 and 0 < row < 1 << 40 and operand.data_ptr() % 16 == 0 and sizes


def _readable(operand: Tensor) -> Tensor:
    """The operand, or an aligned copy of it, which pays since tiles are read many times and the copy is written
    once."""
    if operand.device.type == "cpu":  # the interpreter's product reads bfloat16's bits as integers
        return operand.float() if operand.dtype == torch.bfloat16 else operand
    if _aligned(operand):
        return operand
    tokens, width = operand.shape
    pitch = triton.cdiv(width, 16) * 16
    return operand.new_empty((tokens, pitch))[:, :width].copy_(operand)


_HOPPER_SHARED = 232448  # bytes of shared memory that a program may take; the shipped configurations come near it


@functools.cache
def _hopper(device: torch.device) -> bool:
    """Whether the device has tensor descriptors and the shared memory that the shipped configurations take."""
    if device.type != "cuda" or TensorDescriptor is None:
        return False
    properties = torch.cuda.get_device_properties(device)
    # ROCm's properties lack the field.
    return properties.major >= 9 and getattr(properties, "shared_memory_per_block_optin", 0) >= _HOPPER_SHARED


def _described(*operands: Tensor) -> bool:
    return _hopper(operands[0].device) and all(_aligned(x) for x in operands)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _precision(operand: Tensor) -> str:
    """How float32 tiles are multiplied.

    On Hopper each factor is split into three bfloat16 parts, and six of their products keep float32's digits: the ones
    left out are under 2^-24. The tensor cores take bfloat16 operands in either layout, TF32 ones with the tokens
    contiguous only.
    """
    return "bf16x6" if operand.dtype == torch.float32 and _hopper(operand.device) else "ieee"


def launch(
    plan: Cut,
    a: Tensor,
    b: Tensor,
    call: LinearCall,
    fine: Tensor,
    coarse: Tensor,
    accumulate: bool,
) -> None:
    """Launches the kernels of one call. `a` is the operand on the units' side, `[tokens, lines]`, and `b` the other
    one, `[tokens, reduce]`; both have passed `_readable`."""
    weight, axis, order, per_sample = call.weight, call.axis, call.order, call.per_sample
    config, device = plan.config, weight.device
    (tokens, lines), reduce, samples = a.shape, b.shape[1], call.samples
    units = fine.shape[-1]
    whole = not plan.ragged and plan.length % config.block_k == 0 and tokens % config.block_k == 0
    # Beyond the last token a descriptor reads zeros, but beyond a sample's last token it reads the next sample.
    alone = plan.length == tokens or not per_sample
    descriptor = not plan.ragged and (whole or alone) and _described(a, b)
    x = TensorDescriptor.from_tensor(a, [config.block_k, config.block_u]) if descriptor else a
    y = TensorDescriptor.from_tensor(b, [config.block_k, config.block_r]) if descriptor else b
    weight_descriptor = _described(weight)
    w = weight
    if weight_descriptor:
        block = [config.block_u, config.block_r]
        w = TensorDescriptor.from_tensor(weight, block if axis == 0 else block[::-1])
    offsets = offsets_on(device, tuple(call.offsets)) if plan.ragged else None
    count = min(plan.tiles, plan.tiles_per_launch)
    partial = torch.empty((count, plan.rows, config.block_u), dtype=torch.float32, device=device)
    add = accumulate or plan.tiles > count
    if add and not accumulate:
        fine.zero_()
        coarse.zero_()
    strides = (*a.stride(), *b.stride(), weight.stride(axis), weight.stride(1 - axis))
    common = {
        "WHOLE": whole,
        "DESCRIPTOR": descriptor,
        "WEIGHT_DESCRIPTOR": weight_descriptor,
        "FLIP": axis == 1,
        "GROUP": config.group,
        "PRECISION": _precision(a),
        "STAGES": config.stages,
        "BLOCK_U": config.block_u,
        "BLOCK_R": config.block_r,
        "BLOCK_K": config.block_k,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    for first in range(0, plan.tiles, count):
        last = min(first + count, plan.tiles)
        tiles = (plan.u_blocks, plan.r_blocks, first, last, call.scale, 1.0 / samples)
        if plan.form == "total":
            programs = min(last - first, config.per_sm * _multiprocessors(device))
            kernels.linear_total[(programs,)](
                x, y, w, partial, lines, reduce, tokens, plan.steps, *tiles, *strides, **common
            )
        else:
            kernels.linear_samples[(last - first,)](
                x,
                y,
                w,
                partial,
                offsets,
                lines,
                reduce,
                tokens,
                samples,
                plan.length,
                plan.steps,
                *tiles,
                *strides,
                TOTAL=plan.form != "square",
                SQUARE=plan.form != "sum",
                FINE=order,
                COARSE="samples" if per_sample else "mean",
                RAGGED=plan.ragged,
                ONE_STEP=config.single and per_sample and plan.length <= config.block_k,
                SEGMENT=plan.segment,
                **common,
            )
        _finish(plan, partial, fine, coarse, first, last, lines, units, call.group_size, add)


def _finish(
    plan: Cut,
    partial: Tensor,
    fine: Tensor,
    coarse: Tensor,
    first: int,
    last: int,
    lines: int,
    units: int,
    group_size: int,
    add: bool,
) -> None:
    """Adds the partial sums of the tiles from `first` up to `last` to the units that they touch."""
    config = plan.config
    band = config.group * plan.r_blocks
    line_begin = first // band * config.group * config.block_u
    line_end = min(triton.cdiv(last, band) * config.group * config.block_u, lines)
    fold = group_size > 1
    block = min(triton.next_power_of_2(group_size), 128) if fold else min(config.block_u, 64)
    span = group_size if fold else block
    first_unit = line_begin // span
    unit_blocks = triton.cdiv(line_end, span) - first_unit
    kernels.linear_finish[(unit_blocks * plan.rows,)](
        partial,
        fine,
        coarse,
        plan.fine_rows,
        plan.rows,
        lines,
        group_size,
        first_unit,
        unit_blocks,
        units,
        plan.u_blocks,
        plan.r_blocks,
        first,
        last,
        FOLD=fold,
        ADD=add,
        GROUP=config.group,
        BLOCK_U=config.block_u,
        BLOCK=block,
        BLOCK_R=min(triton.next_power_of_2(plan.r_blocks), 16),
        num_warps=4,
    )


def linear_importance(call: LinearCall, fine: Tensor, coarse: Tensor, accumulate: bool) -> None:
    weight, axis, order, offsets, per_sample = call.weight, call.axis, call.order, call.offsets, call.per_sample
    lines, reduce = weight.shape[axis], weight.shape[1 - axis]
    if lines == 0 or reduce == 0:
        if not accumulate:
            fine.zero_()
            coarse.zero_()
        return
    a, b = (_readable(x) for x in (call.operands[:2] if axis == 0 else call.operands[1::-1]))
    form = form_of(order, per_sample, offsets[-1])
    wide = weight.dtype == torch.float32
    length = longest(offsets, form, per_sample)
    config = configs.default(form, wide, axis, length, _hopper(weight.device))
    if os.environ.get(configs.AUTOTUNE) == "1" and weight.device.type == "cuda":
        config = _tuned(form, a, b, call)
    plan = cut(config, lines, reduce, offsets, order, per_sample, _described(a, b, weight))
    launch(plan, a, b, call, fine, coarse, accumulate)


_chosen: dict[str, Config] = {}


def _tuned(form: str, a: Tensor, b: Tensor, call: LinearCall) -> Config:
    """The measured configuration of this call's key: from this process, from the file, or measured now."""
    weight, axis, order, offsets, per_sample = call.weight, call.axis, call.order, call.offsets, call.per_sample
    lines, reduce = a.shape[1], b.shape[1]
    name = configs.key(
        torch.cuda.get_device_name(weight.device),
        form,
        str(weight.dtype).removeprefix("torch."),
        axis,
        lines,
        reduce,
        offsets[-1],
        call.samples if per_sample else 1,
    )
    if name not in _chosen:
        _chosen.update({n: c for n, c in configs.read().items() if n not in _chosen})
    if name not in _chosen:
        fine, coarse = (torch.empty(shape, dtype=torch.float32, device=weight.device) for shape in call.shapes)
        times = {}
        for candidate in configs.candidates(form, weight.dtype == torch.float32):
            plan = cut(candidate, lines, reduce, offsets, order, per_sample, _described(a, b, weight))
            run = functools.partial(launch, plan, a, b, call, fine, coarse, False)
            try:
                times[candidate] = _median(run)
            except triton.OutOfResources:  # more shared memory than this device has
                continue
        _chosen[name] = min(times, key=times.__getitem__) if times else configs.PORTABLE
        configs.write(name, _chosen[name])
    return _chosen[name]


def _median(run, count: int = 7) -> float:
    """Median time of `run` on the device, in milliseconds."""
    run()
    times = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
