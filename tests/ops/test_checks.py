"""Every message names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from hywia_kernels import HywiaError, UsageError, ops
from hywia_kernels.ops import TaylorImportance

W = torch.ones(4, 6)
F64, I64 = W.double(), torch.arange(4)
META = torch.ones(4, 6, device="meta")
V = torch.ones(4)


def taylor(weight=W, grad=W, fisher=None, **options):
    options.setdefault("axis", 0)
    return lambda: ops.taylor_importance(weight, grad, fisher, **options)


DY, X = torch.ones(12, 4), torch.ones(12, 6)


def linear(grad_output=DY, input=X, weight=W, **options):
    options.setdefault("axis", 0)
    return lambda: ops.linear_importance(grad_output, input, weight, **options)


def compact(weight=W, keep=I64, *args, **options):
    return lambda: ops.compact(weight, keep, *args, **options)


def fuse(fine=V, coarse=V, **options):
    return lambda: ops.attention_fusion(fine, coarse, **options)


DTYPE = "expected dtype float32, bfloat16, float16, got {}; convert it with .to(...)"
AXIS = "axis: expected 0 (units are rows) or 1 (units are columns), got {}"
SAMPLES = "samples: expected a positive divisor of the 12 tokens, or offsets, got {}"
DIVISOR = "group_size: expected a positive divisor of the weight's size {} along axis {}, got {}"
OFFSETS = "samples: expected offsets that increase from 0 to the 12 tokens, got {}"
KIND = "samples: expected a number or offsets [samples + 1], got {}"
TENSOR = "samples: expected int64 offsets [samples + 1] on the CPU, got {}"
SCALE = "scale: expected a positive finite number, got {}"
TEMPERATURE = "temperature: expected a positive finite number, got {}"

WRONG = {
    "axis of 2": (taylor(axis=2), AXIS.format("2")),
    "negative axis": (taylor(axis=-1), AXIS.format("-1")),
    "axis of True": (taylor(axis=True), AXIS.format("True")),
    "axis of None": (taylor(axis=None), AXIS.format("None")),
    "axis of 1.0": (taylor(axis=1.0), AXIS.format("1.0")),
    "order": (taylor(order="third"), "order: expected one of first, second, mixed, got 'third'"),
    "no order": (taylor(order=None), "order: expected one of first, second, mixed, got None"),
    "weight as a list": (taylor(weight=[[1.0]]), "weight: expected a torch.Tensor, got list"),
    "weight of one dimension": (
        taylor(weight=V),
        "weight: expected a matrix [rows, columns], got 1 dimensions; view it as 2-D",
    ),
    "weight of three dimensions": (
        taylor(weight=torch.ones(2, 3, 4)),
        "weight: expected a matrix [rows, columns], got 3 dimensions; view it as 2-D",
    ),
    "weight of float64": (taylor(weight=F64), "weight: " + DTYPE.format("float64")),
    "weight of int8": (taylor(weight=W.to(torch.int8)), "weight: " + DTYPE.format("int8")),
    "weight of complex64": (taylor(weight=W.to(torch.complex64)), "weight: " + DTYPE.format("complex64")),
    "no grad for first": (
        taylor(grad=None),
        "grad: expected a tensor for order='first', got None; only 'second' does without it",
    ),
    "no grad for mixed": (
        taylor(grad=None, fisher=W, order="mixed"),
        "grad: expected a tensor for order='mixed', got None; only 'second' does without it",
    ),
    "no fisher for second": (
        taylor(order="second"),
        "fisher: expected a tensor for order='second', got None; only 'first' does without it",
    ),
    "no fisher for mixed": (
        taylor(order="mixed"),
        "fisher: expected a tensor for order='mixed', got None; only 'first' does without it",
    ),
    "grad as a float": (taylor(grad=1.0), "grad: expected a torch.Tensor, got float"),
    "grad of float64": (taylor(grad=F64), "grad: " + DTYPE.format("float64")),
    "grad of another shape": (taylor(grad=W.t()), "grad: expected the weight's shape [4, 6], got [6, 4]"),
    "grad that would broadcast": (taylor(grad=W[:1]), "grad: expected the weight's shape [4, 6], got [1, 6]"),
    "grad elsewhere": (taylor(grad=META), "grad: expected the weight's device cpu, got meta; move it first"),
    "fisher as a string": (taylor(fisher="f", order="second"), "fisher: expected a torch.Tensor, got str"),
    "fisher of int64": (taylor(fisher=W.long(), order="second"), "fisher: " + DTYPE.format("int64")),
    "fisher of another shape": (
        taylor(fisher=W[:, :5], order="mixed"),
        "fisher: expected the weight's shape [4, 6], got [4, 5]",
    ),
    "fisher elsewhere": (
        taylor(fisher=META, order="second"),
        "fisher: expected the weight's device cpu, got meta; move it first",
    ),
    "group size of 0": (taylor(group_size=0), DIVISOR.format(4, 0, "0")),
    "negative group size": (taylor(group_size=-2), DIVISOR.format(4, 0, "-2")),
    "group size that does not divide": (taylor(group_size=4, axis=1), DIVISOR.format(6, 1, "4")),
    "group size of 2.0": (taylor(group_size=2.0), DIVISOR.format(4, 0, "2.0")),
    "group size of True": (taylor(group_size=True), DIVISOR.format(4, 0, "True")),
    "out of one tensor": (taylor(out=V), "out: expected a pair (fine, signed) of tensors, got Tensor"),
    "out of three": (taylor(out=(V, V, V)), "out: expected a pair (fine, signed) of tensors, got tuple"),
    "out as a list": (taylor(out=[V, V]), "out: expected a pair (fine, signed) of tensors, got list"),
    "out of None": (taylor(out=(None, V)), "out (fine): expected a torch.Tensor, got NoneType"),
    "out of another length": (
        taylor(out=(V, torch.ones(5))),
        "out (signed): expected float32 [4] on cpu, got float32 [5] on cpu",
    ),
    "out of ungrouped length": (
        taylor(out=(V, V), group_size=2),
        "out (fine): expected float32 [2] on cpu, got float32 [4] on cpu",
    ),
    "out of two dimensions": (
        taylor(out=(V[:, None], V)),
        "out (fine): expected float32 [4] on cpu, got float32 [4, 1] on cpu",
    ),
    "out of bfloat16": (
        taylor(out=(V.bfloat16(), V)),
        "out (fine): expected float32 [4] on cpu, got bfloat16 [4] on cpu",
    ),
    "out elsewhere": (
        taylor(out=(V, V.to("meta"))),
        "out (signed): expected float32 [4] on cpu, got float32 [4] on meta",
    ),
    "out with a step": (
        taylor(out=(V, torch.ones(8)[::2])),
        "out (signed): expected a contiguous vector, got strides (2,); pass .contiguous()",
    ),
    "linear: mapped as a list": (linear(mapped=[1.0], axis=0), "mapped: expected a torch.Tensor, got list"),
    "linear: mapped of the other axis": (
        linear(mapped=X, axis=0),
        "mapped: expected float32 [12, 4] on cpu, got float32 [12, 6] on cpu; leave it out",
    ),
    "linear: mapped of another dtype": (
        linear(mapped=X.half(), axis=1),
        "mapped: expected float32 [12, 6] on cpu, got float16 [12, 6] on cpu; leave it out",
    ),
    "linear: axis": (linear(axis=2), AXIS.format("2")),
    "linear: axis of True": (linear(axis=True), AXIS.format("True")),
    "linear: order": (linear(order="third"), "order: expected one of first, second, mixed, all, got 'third'"),
    "linear: no grad_output": (linear(None), "grad_output: expected a torch.Tensor, got NoneType"),
    "linear: input as a list": (linear(input=[1.0]), "input: expected a torch.Tensor, got list"),
    "linear: weight as a list": (linear(weight=[[1.0]]), "weight: expected a torch.Tensor, got list"),
    "linear: grad_output of three dimensions": (
        linear(DY.view(3, 4, 4)),
        "grad_output: expected a matrix, got 3 dimensions; pass .flatten(0, -2)",
    ),
    "linear: input of one dimension": (
        linear(input=V),
        "input: expected a matrix, got 1 dimensions; pass .flatten(0, -2)",
    ),
    "linear: weight of one dimension": (
        linear(weight=V),
        "weight: expected a matrix, got 1 dimensions; pass .flatten(0, -2)",
    ),
    "linear: weight of float64": (
        linear(DY.double(), X.double(), F64),
        "grad_output: " + DTYPE.format("float64"),
    ),
    "linear: grad_output of another dtype": (
        linear(DY.bfloat16()),
        "grad_output: expected the weight's float32 on cpu, got bfloat16 on cpu; convert it with .to(weight)",
    ),
    "linear: input of another dtype": (
        linear(input=X.half()),
        "input: expected the weight's float32 on cpu, got float16 on cpu; convert it with .to(weight)",
    ),
    "linear: input elsewhere": (
        linear(input=X.to("meta")),
        "input: expected the weight's float32 on cpu, got float32 on meta; convert it with .to(weight)",
    ),
    "linear: grad_output of another width": (
        linear(X),
        "grad_output: expected [tokens, 4], one column per output, got [12, 6]",
    ),
    "linear: input of another width": (linear(input=DY), "input: expected [12, 6], got [12, 4]"),
    "linear: input of other tokens": (linear(input=X[:8]), "input: expected [12, 6], got [8, 6]"),
    "linear: samples of 0": (linear(samples=0), SAMPLES.format("0")),
    "linear: samples that do not divide": (linear(samples=5), SAMPLES.format("5")),
    "linear: no tokens": (
        linear(DY[:0], X[:0]),
        "samples: expected a positive divisor of the 0 tokens, or offsets, got 1",
    ),
    "linear: samples of True": (linear(samples=True), KIND.format("True")),
    "linear: samples as a string": (linear(samples="3"), KIND.format("'3'")),
    "linear: samples of None": (linear(samples=None), KIND.format("None")),
    "linear: offsets of floats": (linear(samples=[0, 12.0]), KIND.format("[0, 12.0]")),
    "linear: offsets of one": (linear(samples=[0]), OFFSETS.format("[0]")),
    "linear: offsets from 1": (linear(samples=[1, 12]), OFFSETS.format("[1, 12]")),
    "linear: offsets too short": (linear(samples=[0, 4, 8]), OFFSETS.format("[0, 4, 8]")),
    "linear: an empty sample": (linear(samples=[0, 4, 4, 12]), OFFSETS.format("[0, 4, 4, 12]")),
    "linear: offsets of int32": (linear(samples=torch.tensor([0, 12]).int()), TENSOR.format("int32 [2] on cpu")),
    "linear: offsets of two dimensions": (
        linear(samples=torch.tensor([[0, 12]])),
        TENSOR.format("int64 [1, 2] on cpu"),
    ),
    "linear: offsets elsewhere": (
        linear(samples=torch.tensor([0, 12]).to("meta")),
        TENSOR.format("int64 [2] on meta"),
    ),
    "linear: group size that does not divide": (linear(group_size=4, axis=1), DIVISOR.format(6, 1, "4")),
    "linear: per_sample of 1": (
        linear(per_sample=1),
        "per_sample: expected True, or False with order='first', got 1 with 'first'",
    ),
    "linear: no samples apart for the second order": (
        linear(per_sample=False, order="all"),
        "per_sample: expected True, or False with order='first', got False with 'all'",
    ),
    "linear: scale of 0": (linear(scale=0.0), SCALE.format("0.0")),
    "linear: scale of infinity": (linear(scale=float("inf")), SCALE.format("inf")),
    "linear: scale of NaN": (linear(scale=float("nan")), SCALE.format("nan")),
    "linear: scale of True": (linear(scale=True), SCALE.format("True")),
    "linear: scale as a string": (linear(scale="1"), SCALE.format("'1'")),
    "linear: out of one tensor": (linear(out=V), "out: expected a pair (fine, coarse) of tensors, got Tensor"),
    "linear: fine of one order": (
        linear(order="all", out=(V, V[None])),
        "out (fine): expected float32 [3, 4] on cpu, got float32 [4] on cpu",
    ),
    "linear: coarse of one sample": (
        linear(samples=3, out=(V, V[None])),
        "out (coarse): expected float32 [3, 4] on cpu, got float32 [1, 4] on cpu",
    ),
    "linear: coarse of float64": (
        linear(out=(V, V[None].double())),
        "out (coarse): expected float32 [1, 4] on cpu, got float64 [1, 4] on cpu",
    ),
    "linear: coarse transposed": (
        linear(samples=3, out=(V, torch.ones(4, 3).t())),
        "out (coarse): expected a contiguous matrix, got strides (1, 3); pass .contiguous()",
    ),
    "compact: axis": (compact(W, I64, 2), AXIS.format("2")),
    "compact: axis of False": (compact(W, I64, False), AXIS.format("False")),
    "compact: axis of 0.0": (compact(W, I64, 0.0), AXIS.format("0.0")),
    "compact: weight as a list": (compact([1.0]), "weight: expected a torch.Tensor, got list"),
    "compact: weight of float64": (compact(F64), "weight: " + DTYPE.format("float64")),
    "compact: weight of three dimensions": (
        compact(torch.ones(2, 3, 4)),
        "weight: expected a matrix or a vector, got 3 dimensions",
    ),
    "compact: weight of no dimension": (
        compact(torch.ones(())),
        "weight: expected a matrix or a vector, got 0 dimensions",
    ),
    "compact: columns of a vector": (compact(V, I64, 1), "axis: expected 0 for a vector, got 1"),
    "compact: keep as a list": (compact(W, [0, 1]), "keep: expected a torch.Tensor, got list"),
    "compact: keep of int32": (compact(W, I64.int()), "keep: expected int64 [kept], got int32 [4]"),
    "compact: keep as a mask": (compact(W, I64 > 1), "keep: expected int64 [kept], got bool [4]"),
    "compact: keep of two dimensions": (
        compact(W, I64[None]),
        "keep: expected int64 [kept], got int64 [1, 4]",
    ),
    "compact: keep elsewhere": (
        compact(W, I64.to("meta")),
        "keep: expected the CPU or the weight's device cpu, got meta",
    ),
    "compact: out as a tuple": (compact(out=(W,)), "out: expected a torch.Tensor, got tuple"),
    "compact: out of another shape": (
        compact(W, I64[:2], out=W),
        "out: expected float32 [2, 6] on cpu, got float32 [4, 6] on cpu",
    ),
    "compact: out of another shape along columns": (
        compact(W, I64[:2], 1, out=W),
        "out: expected float32 [4, 2] on cpu, got float32 [4, 6] on cpu",
    ),
    "compact: out of another dtype": (
        compact(out=W.half()),
        "out: expected float32 [4, 6] on cpu, got float16 [4, 6] on cpu",
    ),
    "compact: out elsewhere": (
        compact(out=META),
        "out: expected float32 [4, 6] on cpu, got float32 [4, 6] on meta",
    ),
    "compact: out transposed": (
        compact(out=torch.ones(6, 4).t()),
        "out: expected a contiguous tensor, got strides (1, 4)",
    ),
    "fusion: fine as a list": (fuse([1.0]), "fine: expected a torch.Tensor, got list"),
    "fusion: fine of two dimensions": (fuse(W), "fine: expected a vector [units], got 2 dimensions"),
    "fusion: fine of float64": (
        fuse(V.double()),
        "fine: expected float32 [4] on cpu, got float64 [4] on cpu",
    ),
    "fusion: fine with a step": (
        fuse(torch.ones(8)[::2]),
        "fine: expected a contiguous vector, got strides (2,); pass .contiguous()",
    ),
    "fusion: no coarse": (fuse(V, None), "coarse: expected a torch.Tensor, got NoneType"),
    "fusion: coarse of another length": (
        fuse(V, torch.ones(3)),
        "coarse: expected float32 [4] on cpu, got float32 [3] on cpu",
    ),
    "fusion: coarse of bfloat16": (
        fuse(V, V.bfloat16()),
        "coarse: expected float32 [4] on cpu, got bfloat16 [4] on cpu",
    ),
    "fusion: coarse elsewhere": (
        fuse(V, V.to("meta")),
        "coarse: expected float32 [4] on cpu, got float32 [4] on meta",
    ),
    "fusion: temperature of 0": (fuse(temperature=0.0), TEMPERATURE.format("0.0")),
    "fusion: negative temperature": (fuse(temperature=-1), TEMPERATURE.format("-1")),
    "fusion: infinite temperature": (fuse(temperature=float("inf")), TEMPERATURE.format("inf")),
    "fusion: temperature of NaN": (fuse(temperature=float("nan")), TEMPERATURE.format("nan")),
    "fusion: temperature as a string": (fuse(temperature="1"), TEMPERATURE.format("'1'")),
    "fusion: no temperature": (fuse(temperature=None), TEMPERATURE.format("None")),
    "fusion: out": (fuse(out=V), "out: expected a pair (score, weight) of tensors, got Tensor"),
    "fusion: out of another length": (
        fuse(out=(V, torch.ones(2))),
        "out (weight): expected float32 [4] on cpu, got float32 [2] on cpu",
    ),
    "fusion: out of float16": (
        fuse(out=(V.half(), V)),
        "out (score): expected float32 [4] on cpu, got float16 [4] on cpu",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    call, message = WRONG[name]
    with pytest.raises(UsageError) as caught:
        call()
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, HywiaError)


def test_a_refused_call_leaves_out_alone():
    fine, signed = torch.full((4,), 7.0), torch.full((4,), 7.0)
    with pytest.raises(UsageError, match="order"):
        ops.taylor_importance(W, W, axis=0, order="third", out=(fine, signed))
    assert fine.tolist() == signed.tolist() == [7.0] * 4


def test_a_result_may_be_passed_on_as_out():
    """That is how coupled matrices follow one another."""
    result = ops.taylor_importance(W, W, axis=0)
    again = ops.taylor_importance(2 * W, W, axis=0, out=result)
    assert isinstance(again, TaylorImportance)
    assert again.fine is result.fine
    assert again.fine.tolist() == [18.0] * 4
    fused = ops.attention_fusion(V, V)
    assert ops.attention_fusion(V, V, out=fused).weight is fused.weight


def test_what_an_order_does_not_read_is_not_checked():
    assert ops.taylor_importance(W, W, F64[:1], axis=0).fine.tolist() == [6.0] * 4
    assert ops.taylor_importance(W, F64[:1], W, axis=0, order="second").signed.tolist() == [3.0] * 4
