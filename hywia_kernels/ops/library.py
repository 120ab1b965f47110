"""The ops as `torch.library` custom ops: the eager bodies, and the fake implementations that torch.compile traces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import checks
from .calls import BatchCall, DistillationCall, LinearCall, TaylorCall, TopDistillationCall
from .registry import implementation

Call = TaylorCall | LinearCall | BatchCall | DistillationCall | TopDistillationCall
Sums = tuple[Tensor, Tensor]


def taylor_importance(call: TaylorCall, backend: str | None = None) -> Sums:
    run = implementation("taylor_importance", backend, *call.operands)
    fine, signed = (torch.empty(call.units, dtype=torch.float32, device=call.weight.device) for _ in range(2))
    run(call, fine, signed, False)
    return fine, signed


def taylor_importance_(call: TaylorCall, fine: Tensor, signed: Tensor, backend: str | None = None) -> None:
    implementation("taylor_importance", backend, *call.operands)(call, fine, signed, True)


def linear_importance(call: LinearCall, backend: str | None = None) -> Sums:
    run = implementation("linear_importance", backend, *call.operands)
    fine, coarse = (torch.empty(shape, dtype=torch.float32, device=call.weight.device) for shape in call.shapes)
    run(call, fine, coarse, False)
    return fine, coarse


def linear_importance_(call: LinearCall, fine: Tensor, coarse: Tensor, backend: str | None = None) -> None:
    implementation("linear_importance", backend, *call.operands)(call, fine, coarse, True)


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


def taylor_importance_batch(call: BatchCall, backend: str | None = None) -> list[Tensor]:
    """Returns the fine and the signed sums of each result in turn, `[fine, signed, fine, signed, …]`."""
    run = implementation("taylor_importance_batch", backend, *call.operands)
    device = call.weights[0].device
    flat = [torch.empty(n, dtype=torch.float32, device=device) for n in call.units for _ in range(2)]
    run(call, flat[::2], flat[1::2], False)
    return flat


def taylor_importance_batch_(
    call: BatchCall, fine: list[Tensor], signed: list[Tensor], backend: str | None = None
) -> None:
    implementation("taylor_importance_batch", backend, *call.operands)(call, fine, signed, True)


def distillation_gradient_(
    call: DistillationCall, loss: Tensor, gradient: Tensor | None, backend: str | None = None
) -> None:
    implementation("distillation_gradient", backend, *call.operands)(call, loss, gradient)


def top_distillation_gradient_(
    call: TopDistillationCall, loss: Tensor, gradient: Tensor | None, backend: str | None = None
) -> None:
    implementation("top_distillation_gradient", backend, *call.operands)(call, loss, gradient)


def _register(name: str, schema: str, body, fake, mutates: tuple[str, ...] = ()) -> None:
    # The dispatcher drops trailing arguments that equal their default, so bodies and fakes default `backend` too.
    torch.library.custom_op(f"hywia::{name}", body, mutates_args=mutates, schema=schema).register_fake(fake)


def _flat(function: Callable, kind: type[Call]) -> Callable:
    """Wraps a function of a call for the dispatcher, which passes the call's fields one by one."""
    count = len(kind._fields)

    def of_fields(*arguments):
        return function(kind(*arguments[:count]), *arguments[count:])

    return of_fields


def _fake_taylor(call: TaylorCall, backend=None):
    return tuple(call.weight.new_empty(call.units, dtype=torch.float32) for _ in range(2))


def _fake_linear(call: LinearCall, backend=None):
    return tuple(call.weight.new_empty(shape, dtype=torch.float32) for shape in call.shapes)


def _fake_taylor_batch(call: BatchCall, backend=None):
    return [call.weights[0].new_empty(n, dtype=torch.float32) for n in call.units for _ in range(2)]


def _fake_compact(weight, keep, axis, backend=None):
    shape = list(weight.shape)
    shape[axis] = keep.shape[0]
    return weight.new_empty(shape)


def _fake_fusion(fine, coarse, temperature, backend=None):
    return torch.empty_like(fine), torch.empty_like(fine)


def _fake_inplace(*args) -> None:
    return None


_SUMS: tuple[tuple[type[Call], Callable, Callable, Callable, str, str, str], ...] = (
    (
        TaylorCall,
        taylor_importance,
        taylor_importance_,
        _fake_taylor,
        "Tensor weight, Tensor? grad, Tensor? fisher, int axis, str order, SymInt group_size",
        "Tensor(a!) fine, Tensor(b!) signed",
        "(Tensor, Tensor)",
    ),
    (
        LinearCall,
        linear_importance,
        linear_importance_,
        _fake_linear,
        "Tensor grad_output, Tensor input, Tensor weight, int[] offsets, int axis, str order, SymInt group_size, "
        "bool per_sample, float scale, Tensor? mapped",
        "Tensor(a!) fine, Tensor(b!) coarse",
        "(Tensor, Tensor)",
    ),
    (
        BatchCall,
        taylor_importance_batch,
        taylor_importance_batch_,
        _fake_taylor_batch,
        "Tensor[] weights, Tensor[] grads, Tensor[] fishers, int[] axes, str order, SymInt[] group_sizes, int[] into",
        "Tensor(a!)[] fine, Tensor(b!)[] signed",
        "Tensor[]",
    ),
)
for _kind, _body, _adding, _fake, _fields, _outputs, _result in _SUMS:
    _name = _body.__name__
    _register(_name, f"({_fields}, str? backend=None) -> {_result}", _flat(_body, _kind), _flat(_fake, _kind))
    _register(
        f"{_name}_",
        f"({_fields}, {_outputs}, str? backend=None) -> ()",
        _flat(_adding, _kind),
        _fake_inplace,
        tuple(output.split()[-1] for output in _outputs.split(",")),
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

# There is no form that makes its own gradient: one as large as the logits is what these ops are there to avoid.
_SHARED = "Tensor weight, Tensor? labels, float hard, float student_scale, float? student_cap"
_WRITTEN = "Tensor(a!) loss, Tensor(b!)? gradient, str? backend=None) -> ()"
_register(
    "distillation_gradient_",
    f"(Tensor student, Tensor teacher, {_SHARED}, float teacher_scale, float? teacher_cap, {_WRITTEN}",
    _flat(distillation_gradient_, DistillationCall),
    _fake_inplace,
    ("loss", "gradient"),
)
_register(
    "top_distillation_gradient_",
    f"(Tensor student, Tensor indices, Tensor log_probabilities, Tensor rest, {_SHARED}, {_WRITTEN}",
    _flat(top_distillation_gradient_, TopDistillationCall),
    _fake_inplace,
    ("loss", "gradient"),
)
