"""Public operations, and the contract that every backend meets.

Each op is checked once here (`checks`), handed to one backend (`registry`), and means what `reference` computes in
float64. The backends hold no contract of their own: they may assume that the checks have passed.

Common rules
------------
* dtypes: `weight`, `grad` and `fisher` are float32, bfloat16 or float16, each on its own; sums are float32.
* layout: any strides (transposed, sliced, expanded); sizes and offsets are 64-bit.
* determinism: a fixed order of accumulation and no float atomics; the same input gives the same bits every run.
* choice: `backend=` beats the environment variable `HYWIA_BACKEND` beats the automatic choice. The automatic choice
  may fall back (the reason is logged once); a named backend never does.
* `torch.compile`: every op is a `torch.library` custom op with a fake implementation.
* none of the ops is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, library
from .both_axes import taylor_importance_both
from .calls import TaylorCall
from .distillation import DistillationGradient, distillation_gradient, top_distillation_gradient
from .registry import BACKENDS, Availability, availability, choose, require

__all__ = [
    "BACKENDS",
    "AttentionFusion",
    "Availability",
    "DistillationGradient",
    "LinearImportance",
    "TaylorImportance",
    "attention_fusion",
    "availability",
    "choose",
    "compact",
    "distillation_gradient",
    "linear_importance",
    "require",
    "taylor_importance",
    "taylor_importance_batch",
    "taylor_importance_both",
    "top_distillation_gradient",
]


class TaylorImportance(NamedTuple):
    """Fine and signed sums, float32 `[units]` each."""

    fine: Tensor
    signed: Tensor


class LinearImportance(NamedTuple):
    """Fine sums float32 `[units]` (`[3, units]` for order "all"), signed sums float32 `[samples, units]`."""

    fine: Tensor
    coarse: Tensor


class AttentionFusion(NamedTuple):
    """Fused score and the fine estimate's blend weight in [0, 1], float32 `[units]` each."""

    score: Tensor
    weight: Tensor


def _body(name: str, *operands: object) -> Any:
    """The op as torch's dispatcher knows it where the call is traced (see `checks.traced`); else its eager body, which
    takes less time to reach."""
    return getattr(torch.ops.hywia if checks.traced(*operands) else library, name)


def _sums(op: str, call: Any, out: tuple | None, backend: str | None) -> Any:
    """The op's sums, new or added to `out`: through torch's dispatcher where the call is traced, else by the eager
    body, which takes less time to reach."""
    name, outputs = (op, ()) if out is None else (f"{op}_", out)
    if checks.traced(*call.operands):
        made = getattr(torch.ops.hywia, name)(*call, *outputs, backend)
    else:
        made = getattr(library, name)(call, *outputs, backend)
    return made if out is None else out


def taylor_importance(
    weight: Tensor,
    grad: Tensor | None,
    fisher: Tensor | None = None,
    *,
    axis: int,
    order: str = "first",
    group_size: int = 1,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> TaylorImportance:
    """Fine and signed Taylor sums per unit of one matrix, from a single read of its operands.

    With `t = grad·weight` (`order="first"`), `½·fisher·weight²` (`"second"`) or `grad·weight − ½·fisher·weight²`
    (`"mixed"`), a unit's fine sum is `Σ|t|` and its signed sum `Σt`. A unit is `group_size` consecutive rows
    (`axis=0`) or columns (`axis=1`): a channel, a head, or a KV group with all its query heads. The sign survives
    the fold, so the coarse estimate `|Σt|` is taken by the caller after every coupled matrix has been added.

    Source: LLM-Pruner (arXiv 2305.11627), element-wise and vector-wise Taylor importance; the fine and coarse grains
    of HyWIA (arXiv 2403.10799).

    Args:
        weight: `[rows, columns]`, float32, bfloat16 or float16.
        grad: like `weight` in shape and device, in any of the three dtypes. Not read, and may be None, when
            `order="second"`.
        fisher: mean of squared per-sample gradients, like `grad`. Needed by "second" and "mixed"; pass float32, since
            squares of float16 gradients underflow.
        axis: where the units lie. 0: one score per row (or group of rows); 1: per column.
        order: "first", "second" or "mixed".
        group_size: consecutive rows or columns per unit; divides `weight.shape[axis]`.
        out: `(fine, signed)` of an earlier call, contiguous float32 `[units]` on the same device: this matrix is
            *added* to them, and they are returned. That is how the coupled matrices of a group become one result.
        backend: "reference", "native", "triton", "cuda", or None for the automatic choice.

    Returns:
        `TaylorImportance(fine, signed)`, float32 `[units]`.

    Raises:
        UsageError: an argument outside the above. BackendError: a named backend that is off or cannot do this.
    """
    call = checks.taylor_importance(TaylorCall(weight, grad, fisher, axis, order, group_size), out)
    return TaylorImportance(*_sums("taylor_importance", call, out, backend))


def linear_importance(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    *,
    samples: int | Sequence[int] | Tensor = 1,
    axis: int,
    order: str = "first",
    group_size: int = 1,
    per_sample: bool = True,
    scale: float = 1.0,
    mapped: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> LinearImportance:
    """Fine and per-sample signed Taylor sums of a linear layer's units, straight from its backward.

    With `G_s = scale·grad_output_sᵀ·input_s` (the weight gradient of sample `s`), `G = mean_s G_s` and
    `F = mean_s G_s²`, a unit's fine sum is `Σ|t|` over its part of the weight, `t` as in `taylor_importance`, and
    `coarse[s] = Σ G_s·weight` is the derivative of sample `s`'s loss with respect to a multiplicative mask on the unit.
    Backends "triton" and "cuda" never write the weight gradient to memory; the others form it, "native" a block at a
    time.

    Source: the weight gradient of a linear map; Taylor importance of LLM-Pruner (arXiv 2305.11627) with the diagonal
    empirical Fisher information; grains of HyWIA (arXiv 2403.10799).

    Args:
        grad_output: `[tokens, out]`, the loss's derivative with respect to the layer's output; float32, bfloat16 or
            float16. Each sample's own loss, not divided by the number of samples.
        input: `[tokens, in]`, what the layer was applied to; dtype and device of `grad_output`.
        weight: `[out, in]`, in that dtype and on that device.
        samples: how the tokens fall into samples: a number of equally long ones (it divides `tokens`), or offsets
            `[samples + 1]` from 0 to `tokens`, strictly increasing (a list, or an int64 tensor on the CPU).
        axis: where the units lie. 0: rows (outputs); 1: columns (inputs).
        order: "first", "second", "mixed", or "all": these three, from the one pass that "mixed" takes.
        group_size: consecutive rows or columns per unit; divides `weight.shape[axis]`.
        per_sample: False gives `mean_s` of the signed sums as one row `[1, units]`. That is cheaper, since no sample is
            told from the next, and only order "first" allows it. Backend "cuda" then adds up all tokens in the tensor
            cores, which cut off what they add: a sum is some 4e-6 low after 4,096 tokens, and 1e-4 after 65,536.
        scale: multiplies every `G_s`; pass the inverse of a loss scale.
        mapped: the weight times the operand whose columns are not the units, where the caller has it already:
            `input @ weight.T` `[tokens, out]` for axis 0 (the layer's output without its bias), `grad_output @ weight`
            `[tokens, in]` for axis 1 (its input's gradient); dtype and device of `weight`. `coarse[s]` is then a sum
            over tokens of products of activations, by the identity `Σ_w G_s·w = Σ_t y·dy = Σ_t x·dx`, rounded as
            `mapped` is. Backend "cuda" uses it, because it then needs no sample's gradient by itself; the others form
            the gradients in any case and do not read it.
        out: `(fine, coarse)` of an earlier call, contiguous float32 on the same device: *added* to, and returned.
        backend: "reference", "native", "triton", "cuda", or None for the automatic choice.

    Returns:
        `LinearImportance(fine, coarse)`, float32: `[units]`, or `[3, units]` for "all" (first, second, mixed), and
        `[samples, units]`, or `[1, units]`. Sums are float32 or wider. bfloat16 and float16 products are exact; float32
        products are float32's on every backend, never TF32's.

    Raises:
        UsageError: an argument outside the above. BackendError: a named backend that is off or cannot do this.
    """
    call = checks.linear_importance(
        grad_output, input, weight, samples, axis, order, group_size, per_sample, scale, mapped, out
    )
    return LinearImportance(*_sums("linear_importance", call, out, backend))


def compact(
    weight: Tensor, keep: Tensor, axis: int = 0, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The surviving rows or columns of a matrix (or entries of a vector), packed; only the kept part is read.

    Args:
        weight: `[rows, columns]`, or `[entries]` (a bias) with `axis=0`; float32, bfloat16 or float16; any strides.
        keep: int64 `[kept]`, strictly increasing, within `weight.shape[axis]`; on the weight's device or on the CPU.
        axis: 0 keeps rows, 1 keeps columns.
        out: contiguous destination of the result's shape, dtype and device, overlapping neither input.
        backend: as in `taylor_importance`.

    Returns:
        A contiguous tensor equal to `weight.index_select(axis, keep)`.

    Raises:
        UsageError: an argument outside the above. BackendError: a named backend that is off or cannot do this.
    """
    checks.compact(weight, keep, axis, out)
    if out is None:
        functional = _body("compact", weight, keep)
        return functional(weight, keep, axis, backend)
    inplace = _body("compact_", weight, keep)
    inplace(weight, keep, axis, out, backend)
    return out


def attention_fusion(
    fine: Tensor,
    coarse: Tensor,
    *,
    temperature: float = 1.0,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> AttentionFusion:
    """Blend two estimates of every unit's importance by attention over the pair.

    Both estimates are put on one scale: `z = (log x − mean) / std` over the units (population std; `x` is floored at
    1e-12 of its maximum so that dead units stay finite; a constant estimate gives `z = 0`). The two numbers are the
    unit's two tokens; their mean `m = (z_f + z_c)/2` is the query and each token is its own key and value, so

        weight = softmax(m·[z_f, z_c] / temperature)[0],    score = weight·z_f + (1 − weight)·z_c.

    A unit that both grains call important leans on the grain that says so louder; one that both call weak leans on
    the lower. This formula is this project's reading of HyWIA's adaptive fusion (arXiv 2403.10799 publishes no code);
    compare it with its ablations before you trust it.

    Args:
        fine: float32 `[units]`, non-negative (`|t|` summed over weights).
        coarse: float32 `[units]`, non-negative, same device.
        temperature: positive; larger is closer to the plain mean.
        out: `(score, weight)`, contiguous float32 `[units]`, overwritten.
        backend: "reference", "native", "triton", or None for the automatic choice.

    Returns:
        `AttentionFusion(score, weight)`; scores are comparable within one call only, and NaN where the input is NaN.

    Raises:
        UsageError: an argument outside the above. BackendError: a named backend that is off or cannot do this.
    """
    checks.attention_fusion(fine, coarse, temperature, out)
    if out is None:
        functional = _body("attention_fusion", fine, coarse)
        return AttentionFusion(*functional(fine, coarse, temperature, backend))
    score, weight = out
    inplace = _body("attention_fusion_", fine, coarse)
    inplace(fine, coarse, temperature, score, weight, backend)
    return AttentionFusion(score, weight)


def taylor_importance_batch(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    fishers: Sequence[Tensor] | None = None,
    *,
    axes: int | Sequence[int],
    order: str = "first",
    group_sizes: int | Sequence[int] | None = None,
    into: Sequence[int] | None = None,
    out: Sequence[tuple[Tensor, Tensor]] | None = None,
    backend: str | None = None,
) -> list[TaylorImportance]:
    """`taylor_importance` of many matrices at once, so that small ones pay for no launch and no tail of their own.

    Result `r` holds the fine and signed sums of the matrices with `into[i] == r`, added up: the coupled matrices of a
    group (gate and up rows, down columns of an MLP; q, k, v rows, o columns of attention) share one. On the GPU the
    matrices are read by one kernel (a launch for every 24 of them), each once; matrices whose layout it cannot read
    in 16-byte words are scored one after the other instead.

    Source: as `taylor_importance`.

    Args:
        weights: matrices `[rows, columns]` on one device, each float32, bfloat16 or float16; at least one.
        grads: one per weight, like `taylor_importance`'s. Not read, and may be None, when `order="second"`.
        fishers: one per weight, likewise. Needed by "second" and "mixed".
        axes: where the units lie, one per matrix; an int stands for all.
        order: "first", "second" or "mixed", for all matrices.
        group_sizes: consecutive rows or columns per unit, one per matrix; an int stands for all, None for 1.
        into: for each matrix the index of the result it adds to, every index from 0 to the largest at least once; None
            gives each its own. The matrices of a result have equally many units.
        out: one `(fine, signed)` per result, contiguous float32 `[units]` on the same device, no tensor twice: the sums
            are *added* to them, and they are returned.
        backend: as in `taylor_importance`.

    Returns:
        A `TaylorImportance(fine, signed)` per result, float32 `[units]`.

    Raises:
        UsageError: an argument outside the above. BackendError: a named backend that is off or cannot do this.
    """
    call = checks.taylor_importance_batch(weights, grads, fishers, axes, order, group_sizes, into, out)
    if out is None:
        flat = _sums("taylor_importance_batch", call, None, backend)
        return [TaylorImportance(fine, signed) for fine, signed in zip(flat[::2], flat[1::2], strict=True)]
    _sums("taylor_importance_batch", call, ([fine for fine, _ in out], [signed for _, signed in out]), backend)
    return [TaylorImportance(fine, signed) for fine, signed in out]
