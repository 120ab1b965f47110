"""`linear_importance` on the GPU at the sizes of real models, against float64 on the same GPU.

The gate: errors are held against a unit's magnitude, the sum of the magnitudes of what is added into it (`Σ|G·w|`,
`½·Σ F·w²`, or both for "mixed"). Products of bfloat16 and float16 are exact, so what is left is float32 addition. A
tensor core truncates: one step of 16 tokens loses up to 2^-23 of the accumulator, always towards zero, so that K tokens
lose up to K/16·2^-23 of it; measured, a quarter of that: 1.2e-6 for 1280 tokens, 4e-6 for 4096 were a chain that long.
The backends round in between, after 2048 tokens at most. Running sums over samples, and the sums over a unit, round to
nearest and add some 1e-7. 1e-5 leaves a factor of two.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from hywia_kernels import BackendError, ops
from hywia_kernels.method.selection import top_units
from tests.support.operands import bits, lay, need

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
gpu_backends = pytest.mark.parametrize("backend", ["triton", "cuda"])
axes = pytest.mark.parametrize("axis", [0, 1])
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (4403, 1100)]
EQUAL = list(range(0, 1281, 128))
RAGGED = [0, 100, 260, 377, 512, 640, 641, 829, 1000, 1180, 1280]
GATE = 1e-5
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _give_memory_back():
    yield
    torch.cuda.empty_cache()


def operands(shape, tokens=1280, dtype=BF16, seed=0, layout="contiguous"):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    made = (
        scale * torch.randn(size, generator=generator, device=DEVICE)
        for scale, size in ((1e-3, (tokens, shape[0])), (1.0, (tokens, shape[1])), (0.02, shape))
    )
    return tuple(lay(x.to(dtype), layout) for x in made)


def reference(dy, x, w, offsets, axis, order, group_size=1, per_sample=True, thin=False):
    """`(fine, its magnitude, coarse, its magnitude)` in float64, one row per order and sample.

    In a unit of few weights (`thin`) a gradient may cancel to nothing and its rounding errors do not: the magnitude is
    then that of the products it is the sum of, `|grad_output|ᵀ·|input|` in place of the gradient.
    """

    def fold(t):
        return t.sum(1 - axis).view(-1, group_size).sum(1)

    weight = w.double()
    mean, square, mean_size, square_size = (torch.zeros_like(weight) for _ in range(4))
    coarse, sizes = [], []
    for begin, end in itertools.pairwise(offsets):
        dy_s, x_s = dy[begin:end].double(), x[begin:end].double()
        gradient = dy_s.t() @ x_s
        size = dy_s.abs().t() @ x_s.abs() if thin else gradient.abs()
        coarse.append(fold(gradient * weight))
        sizes.append(fold(size * weight.abs()))
        mean += gradient
        square += gradient.square()
        mean_size += size
        square_size += size.square()
    count = len(coarse)
    first, second = mean / count * weight, 0.5 * square / count * weight.square()
    first_size = fold(mean_size / count * weight.abs() if thin else first.abs())
    second_size = fold(0.5 * square_size / count * weight.square())
    rows = {
        "first": (fold(first.abs()), first_size),
        "second": (fold(second), second_size),
        "mixed": (fold((first - second).abs()), first_size + second_size),
    }
    fine, magnitudes = (torch.stack(x) for x in zip(*(rows[o] for o in rows if order in (o, "all")), strict=True))
    if per_sample:
        return fine, magnitudes, torch.stack(coarse), torch.stack(sizes)
    return fine, magnitudes, torch.stack(coarse).mean(0, keepdim=True), first_size[None]


def worst(out, want, size):
    error = ((out.double() - want).abs() / size.clamp(min=1e-300)).max().item()
    return error if error == error else float("inf")


def taken(backend, made):
    """`backend`, or None (the automatic choice must serve) where it says that it cannot take such operands."""
    # A single row's stride means nothing, nor a single column's.
    odd = any(
        (x.stride(1) != 1 and x.shape[1] > 1)
        or (x.stride(0) % 8 and x.shape[0] > 1)
        or x.stride(0) < x.shape[1]
        or x.data_ptr() % 16
        for x in made
    )
    if backend == "cuda" and (made[0].dtype == F32 or odd):
        with pytest.raises(BackendError, match="it takes"):
            ops.choose("linear_importance", backend, *made)
        return None
    return ops.choose("linear_importance", backend, *made)


def assert_right(backend, made, offsets, axis, order, group_size=1, per_sample=True, thin=False, gate=GATE):
    backend = taken(backend, made)
    samples = len(offsets) - 1 if offsets == EQUAL else offsets
    options = {"samples": samples, "axis": axis, "order": order, "group_size": group_size}
    got = ops.linear_importance(*made, **options, per_sample=per_sample, backend=backend)
    again = ops.linear_importance(*made, **options, per_sample=per_sample, backend=backend)
    assert torch.equal(bits(got.fine), bits(again.fine))
    assert torch.equal(bits(got.coarse), bits(again.coarse))
    fine, magnitude, coarse, size = reference(*made, offsets, axis, order, group_size, per_sample, thin=thin)
    assert got.fine.shape == (fine.shape if order == "all" else fine.shape[1:])
    assert got.coarse.shape == coarse.shape
    assert worst(got.fine.view_as(fine), fine, magnitude) <= gate
    assert worst(got.coarse, coarse, size) <= gate
    return got, fine


def assert_same_kept(out, want):
    """The kept set is the reference's, but for units so near the cut that the error may swap them."""
    for share in (0.8, 0.5):
        kept = round(share * want.numel())
        border = want.sort(descending=True).values[kept - 1]
        chosen, right = (set(top_units(x, kept).tolist()) for x in (out, want))
        near = set(((want - border).abs() <= 2 * GATE * border).nonzero().flatten().tolist())
        assert chosen ^ right <= near
        assert len(near) < 0.02 * want.numel()


@gpu_backends
@axes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_kept_sets(backend, shape, axis):
    need(backend, "linear_importance")
    made = operands(shape)
    got, fine = assert_right(backend, made, EQUAL, axis, "all")
    for out, want in zip(got.fine, fine, strict=True):
        assert_same_kept(out, want)
    assert_right(backend, made, EQUAL, axis, "first", per_sample=False)


@gpu_backends
@axes
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("order", ["first", "second", "mixed", "all"])
def test_dtypes_and_orders(backend, order, dtype, axis):
    need(backend, "linear_importance")
    made = operands((2048, 1024), dtype=dtype, seed=1)
    assert_right(backend, made, EQUAL, axis, order)
    assert_right(backend, made, RAGGED, axis, order)
    if order == "first":
        assert_right(backend, made, EQUAL, axis, order, per_sample=False)


@gpu_backends
@axes
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_ragged_samples(backend, dtype, axis):
    need(backend, "linear_importance")
    assert_right(backend, operands((4403, 1100), dtype=dtype, seed=2), RAGGED, axis, "all")
    assert_right(backend, operands((4096, 4096), dtype=dtype, seed=2), RAGGED, axis, "all")


@gpu_backends
@axes
def test_heads(backend, axis):
    need(backend, "linear_importance")
    made = operands((4096, 4096), seed=3)
    for order in ("first", "all"):
        assert_right(backend, made, EQUAL, axis, order, group_size=128)
    assert_right(backend, made, EQUAL, axis, "first", group_size=128, per_sample=False)
    assert_right(backend, operands((1120, 1680), seed=4), RAGGED, axis, "all", group_size=80)  # straddles tiles


@gpu_backends
@axes
@pytest.mark.parametrize("layout", ["transposed", "padded", "stepped", "one-row"])
def test_layouts(backend, layout, axis):
    """NaN lies around the views."""
    need(backend, "linear_importance")
    made = operands((520, 264), seed=5, layout=layout)
    assert_right(backend, made, EQUAL, axis, "all")
    assert_right(backend, made, EQUAL, axis, "first", per_sample=False)


@gpu_backends
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_long_samples(backend, dtype):
    """Longer than any chain of additions that may be left to truncation."""
    need(backend, "linear_importance")
    # "cuda" has no registers for a second sum, so its chains are as long as the samples, and squares double the loss.
    gate = 1e-4 if backend == "cuda" else GATE
    made = operands((512, 768), tokens=32768, dtype=dtype, seed=6)
    assert_right(backend, made, [0, 16384, 32768], 0, "all", gate=gate)
    assert_right(backend, made, [0, 20000, 32768], 1, "all", gate=gate)
    assert_right(backend, made, [0, 32768], 1, "first", per_sample=False, gate=gate)


@gpu_backends
@axes
def test_many_samples(backend, axis):
    need(backend, "linear_importance")
    made = operands((1408, 2048), tokens=1024 * 16, seed=7)
    assert_right(backend, made, list(range(0, 1024 * 16 + 1, 16)), axis, "all")


@gpu_backends
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 4096), (4096, 1), (129, 257)], ids=str)
def test_small_and_thin(backend, shape):
    need(backend, "linear_importance")
    for tokens, offsets in ((1, [0, 1]), (7, [0, 3, 7]), (96, [0, 48, 96])):
        made = operands(shape, tokens=tokens, seed=8)
        for axis in (0, 1):
            assert_right(backend, made, offsets, axis, "all", thin=True)
            assert_right(backend, made, offsets, axis, "first", per_sample=False, thin=True)


@gpu_backends
def test_scale_and_accumulation(backend):
    """Two halves added into one result are the whole; a loss scale of 2^16 undone by `scale` changes nothing."""
    need(backend, "linear_importance")
    dy, x, w = operands((1024, 2048), seed=9)
    whole = ops.linear_importance(dy, x, w, samples=10, axis=1, order="all", backend=backend)
    out = tuple(t.clone() for t in whole)
    ops.linear_importance(dy * 2**16, x, w, samples=10, axis=1, order="all", scale=2.0**-16, out=out, backend=backend)
    for added, once in zip(out, whole, strict=True):
        torch.testing.assert_close(added, 2 * once, rtol=1e-6, atol=0)


@gpu_backends
@pytest.mark.parametrize("offsets", [EQUAL, RAGGED], ids=["equal", "ragged"])
def test_a_broken_sample_stays_alone(backend, offsets):
    """NaN and Inf of one sample reach its own signed sums, and the fine sums, and no other sample."""
    need(backend, "linear_importance")
    dy, x, w = operands((512, 512), seed=10)
    clean = ops.linear_importance(dy, x, w, samples=offsets, axis=0, order="all", backend=backend)
    dy[offsets[4] : offsets[5]] = float("nan")
    x[offsets[4] : offsets[5]] = float("inf")
    got = ops.linear_importance(dy, x, w, samples=offsets, axis=0, order="all", backend=backend)
    assert got.coarse[4].isnan().all()
    assert got.fine.isnan().all()
    others = [s for s in range(10) if s != 4]
    assert torch.equal(got.coarse[others], clean.coarse[others])


@axes
@pytest.mark.parametrize("order", ["first", "mixed", "all"])
@pytest.mark.parametrize("offsets", [EQUAL, RAGGED, [0, 1280]], ids=["equal", "ragged", "one"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_signed_sums_from_what_the_weight_made(axis, order, offsets, dtype):
    """With `mapped` the fine sums stay as they are, and the signed sums are exact sums of its products."""
    need("cuda", "linear_importance")
    dy, x, w = operands((4096, 1104), dtype=dtype, seed=11)
    a, mapped = (dy, x @ w.t()) if axis == 0 else (x, dy @ w)
    size = 16
    options = {"samples": offsets, "axis": axis, "order": order, "group_size": size, "backend": "cuda"}
    got = ops.linear_importance(dy, x, w, mapped=mapped, scale=0.5, **options)
    again = ops.linear_importance(dy, x, w, mapped=mapped, scale=0.5, **options)
    plain = ops.linear_importance(dy, x, w, scale=0.5, **options)
    assert torch.equal(bits(got.coarse), bits(again.coarse))
    assert worst(got.fine, plain.fine.double(), plain.fine.double()) <= GATE
    products = 0.5 * a.double() * mapped.double()
    want, magnitude = (
        torch.stack([p[b:e].sum(0) for b, e in itertools.pairwise(offsets)]).view(len(offsets) - 1, -1, size).sum(2)
        for p in (products, products.abs())
    )
    assert worst(got.coarse, want, magnitude) <= GATE
    unit = reference(dy, x, w, offsets, axis, order, size)[3] * 0.5
    assert worst(got.coarse, plain.coarse.double(), unit) <= 2e-2  # mapped itself is rounded to eight bits
