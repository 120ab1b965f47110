"""The ops as `torch.library` custom ops: the eager bodies, and the fake implementations that torch.compile traces."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .batch import triples
from .registry import implementation


def _units(weight: Tensor, axis: int, group_size: int) -> int:
    return weight.shape[axis] // group_size


def taylor_importance(
    weight: Tensor,
    grad: Tensor | None,
    fisher: Tensor | None,
    axis: int,
    order: str,
    group_size: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    run = implementation("taylor_importance", backend, weight, grad, fisher)
    units = _units(weight, axis, group_size)
    fine, signed = (torch.empty(units, dtype=torch.float32, device=weight.device) for _ in range(2))
    run(weight, grad, fisher, axis, order, group_size, fine, signed, False)
    return fine, signed


def taylor_importance_(
    weight: Tensor,
    grad: Tensor | None,
    fisher: Tensor | None,
    axis: int,
    order: str,
    group_size: int,
    fine: Tensor,
    signed: Tensor,
    backend: str | None = None,
) -> None:
    run = implementation("taylor_importance", backend, weight, grad, fisher)
    run(weight, grad, fisher, axis, order, group_size, fine, signed, True)


def linear_importance(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: list[int],
    axis: int,
    order: str,
    group_size: int,
    per_sample: bool,
    scale: float,
    mapped: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    run = implementation("linear_importance", backend, grad_output, input, weight, mapped)
    shapes = checks.linear_shapes(weight, offsets, axis, order, group_size, per_sample)
    fine, coarse = (torch.empty(shape, dtype=torch.float32, device=weight.device) for shape in shapes)
    run(grad_output, input, weight, offsets, axis, order, group_size, per_sample, scale, fine, coarse, False, mapped)
    return fine, coarse


def linear_importance_(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: list[int],
    axis: int,
    order: str,
    group_size: int,
    per_sample: bool,
    scale: float,
    mapped: Tensor | None,
    fine: Tensor,
    coarse: Tensor,
    backend: str | None = None,
) -> None:
    run = implementation("linear_importance", backend, grad_output, input, weight, mapped)
    run(grad_output, input, weight, offsets, axis, order, group_size, per_sample, scale, fine, coarse, True, mapped)


def compact(weight: Tensor, keep: Tensor, axis: int, backend: str | None = None) -> Tensor:
    shape = list(weight.shape)
    shape[axis] = keep.shape[0]
    out = weight.new_empty(shape)
    compact_(weight, keep, axis, out, backend)
    return out


def compact_(weight: Tensor, keep: Tensor, axis: int, out: Tensor, backend: str | None = None) -> None:
    run = implementation("compact", backend, weight)
    checks.keep_values(keep, weight.shape[axis])
    run(weight, keep.to(weight.device, non_blocking=True).contiguous(), axis, out)


def attention_fusion(
    fine: Tensor, coarse: Tensor, temperature: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    score, weight = torch.empty_like(fine), torch.empty_like(fine)
    attention_fusion_(fine, coarse, temperature, score, weight, backend)
    return score, weight


def attention_fusion_(
    fine: Tensor, coarse: Tensor, temperature: float, score: Tensor, weight: Tensor, backend: str | None = None
) -> None:
    run = implementation("attention_fusion", backend, fine, coarse)
    run(fine, coarse, temperature, score, weight)


def _register(name: str, schema: str, body, fake, mutates: tuple[str, ...] = ()) -> None:
    # The dispatcher drops trailing arguments that equal their default, so bodies and fakes default `backend` too.
    torch.library.custom_op(f"hywia::{name}", body, mutates_args=mutates, schema=schema).register_fake(fake)


def _fake_taylor(weight, grad, fisher, axis, order, group_size, backend=None):
    units = _units(weight, axis, group_size)
    return tuple(weight.new_empty(units, dtype=torch.float32) for _ in range(2))


def _fake_linear(grad_output, input, weight, offsets, axis, order, group_size, per_sample, scale, mapped, backend=None):
    shapes = checks.linear_shapes(weight, offsets, axis, order, group_size, per_sample)
    return tuple(weight.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _fake_compact(weight, keep, axis, backend=None):
    shape = list(weight.shape)
    shape[axis] = keep.shape[0]
    return weight.new_empty(shape)


def _fake_fusion(fine, coarse, temperature, backend=None):
    return torch.empty_like(fine), torch.empty_like(fine)


def _fake_inplace(*args) -> None:
    return None


_TAYLOR = "Tensor weight, Tensor? grad, Tensor? fisher, int axis, str order, SymInt group_size, "
_register("taylor_importance", f"({_TAYLOR}str? backend=None) -> (Tensor, Tensor)", taylor_importance, _fake_taylor)
_register(
    "taylor_importance_",
    f"({_TAYLOR}Tensor(a!) fine, Tensor(b!) signed, str? backend=None) -> ()",
    taylor_importance_,
    _fake_inplace,
    ("fine", "signed"),
)
_LINEAR = (
    "Tensor grad_output, Tensor input, Tensor weight, int[] offsets, int axis, str order, SymInt group_size, "
    "bool per_sample, float scale, Tensor? mapped, "
)
_register("linear_importance", f"({_LINEAR}str? backend=None) -> (Tensor, Tensor)", linear_importance, _fake_linear)
_register(
    "linear_importance_",
    f"({_LINEAR}Tensor(a!) fine, Tensor(b!) coarse, str? backend=None) -> ()",
    linear_importance_,
    _fake_inplace,
    ("fine", "coarse"),
)
_register("compact", "(Tensor weight, Tensor keep, int axis, str? backend=None) -> Tensor", compact, _fake_compact)
_register(
    "compact_",
    "(Tensor weight, Tensor keep, int axis, Tensor(a!) out, str? backend=None) -> ()",
    compact_,
    _fake_inplace,
    ("out",),
)
_register(
    "attention_fusion",
    "(Tensor fine, Tensor coarse, float temperature, str? backend=None) -> (Tensor, Tensor)",
    attention_fusion,
    _fake_fusion,
)
_register(
    "attention_fusion_",
    "(Tensor fine, Tensor coarse, float temperature, Tensor(a!) score, Tensor(b!) weight, str? backend=None) -> ()",
    attention_fusion_,
    _fake_inplace,
    ("score", "weight"),
)


def _batch_operands(weights: list[Tensor], grads: list[Tensor], fishers: list[Tensor]) -> list[Tensor | None]:
    """The operands of all matrices in turn, as the backends' `unsupported` looks at them."""
    return [operand for operands in triples(weights, grads, fishers) for operand in operands]


def _batch_units(weights: list[Tensor], axes: list[int], group_sizes: list[int], into: list[int]) -> list[int]:
    """Units of each result."""
    of = {result: _units(weights[i], axes[i], group_sizes[i]) for i, result in enumerate(into)}
    return [of[result] for result in range(len(of))]


def taylor_importance_batch(
    weights: list[Tensor],
    grads: list[Tensor],
    fishers: list[Tensor],
    axes: list[int],
    order: str,
    group_sizes: list[int],
    into: list[int],
    backend: str | None = None,
) -> list[Tensor]:
    """Fine and signed sums of each result in turn."""
    run = implementation("taylor_importance_batch", backend, *_batch_operands(weights, grads, fishers))
    units = _batch_units(weights, axes, group_sizes, into)
    flat = [torch.empty(n, dtype=torch.float32, device=weights[0].device) for n in units for _ in range(2)]
    run(weights, grads, fishers, axes, order, group_sizes, into, flat[::2], flat[1::2], False)
    return flat


def taylor_importance_batch_(
    weights: list[Tensor],
    grads: list[Tensor],
    fishers: list[Tensor],
    axes: list[int],
    order: str,
    group_sizes: list[int],
    into: list[int],
    fine: list[Tensor],
    signed: list[Tensor],
    backend: str | None = None,
) -> None:
    run = implementation("taylor_importance_batch", backend, *_batch_operands(weights, grads, fishers))
    run(weights, grads, fishers, axes, order, group_sizes, into, fine, signed, True)


def _fake_taylor_batch(weights, grads, fishers, axes, order, group_sizes, into, backend=None):
    units = _batch_units(weights, axes, group_sizes, into)
    return [weights[0].new_empty(n, dtype=torch.float32) for n in units for _ in range(2)]


_BATCH = "Tensor[] weights, Tensor[] grads, Tensor[] fishers, int[] axes, str order, SymInt[] group_sizes, int[] into, "
_register(
    "taylor_importance_batch",
    f"({_BATCH}str? backend=None) -> Tensor[]",
    taylor_importance_batch,
    _fake_taylor_batch,
)
_register(
    "taylor_importance_batch_",
    f"({_BATCH}Tensor(a!)[] fine, Tensor(b!)[] signed, str? backend=None) -> ()",
    taylor_importance_batch_,
    _fake_inplace,
    ("fine", "signed"),
)
