"""The GPU backends at the sizes of real models, against the float64 reference on the same GPU."""

from __future__ import annotations

import copy

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import BackendError, UsageError, ops
from hywia_kernels.method.selection import top_units
from hywia_kernels.ops import reference
from hywia_kernels.ops.calls import TaylorCall
from hywia_kernels.ops.checks import DTYPES, ORDERS
from hywia_kernels.ops.registry import implementation
from tests.support.comparison import relative
from tests.support.models import random_model, sizes
from tests.support.operands import GUARD, NARROW, bits, guarded, lay, need, raw_fusion, raw_taylor, untouched
from tests.support.tolerances import TAYLOR, assert_fused, assert_sums, error, magnitude

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DEVICE = "cuda"
gpu_backends = pytest.mark.parametrize("backend", ["triton", "cuda"])
SHAPES = [(4096, 4096), (11008, 4096), (4403, 4097)]
GROUP_SIZES = (1, 7, 17, 128, 512)


@pytest.fixture(autouse=True)
def _give_memory_back():
    yield
    torch.cuda.empty_cache()


def values(shape, dtype=F32, seed=0, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)


def operands(shape, dtypes=(BF16, F32, F32), seed=0, layout="contiguous"):
    """Weights, gradients and squared gradients of the sizes that calibration meets, in one layout."""
    w, g, f = (values(shape, torch.float32, 10 * seed + i) for i in range(3))
    made = (0.02 * w, 1e-3 * g, 0.1 * f.square())
    return tuple(lay(x.to(d), layout) for x, d in zip(made, dtypes, strict=True))


def of_order(order, weight, grad, fisher):
    return weight, None if order == "second" else grad, None if order == "first" else fisher


def assert_right(backend, arguments):
    fine, signed = raw_taylor(backend, *arguments)
    want = reference.taylor_importance_fp64(*arguments)
    scale = magnitude(*arguments) if arguments[4] == "mixed" else want[0]
    assert_sums(fine, signed, want, scale, arguments[0].dtype)
    return fine, want[0]


@gpu_backends
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orders_and_group_sizes(backend, shape, axis):
    """bf16 weights with float32 gradients, on outputs full of NaN; the kept half is the reference's too."""
    need(backend, "taylor_importance")
    made = operands(shape)
    sizes = [g for g in GROUP_SIZES if shape[axis] % g == 0]
    assert len(sizes) >= 2
    for order in ORDERS:
        for group_size in sizes:
            fine, want = assert_right(backend, (*of_order(order, *made), axis, order, group_size))
            kept = fine.numel() // 2
            ordered = want.sort(descending=True).values
            if ordered[kept - 1] - ordered[kept] > 2 * TAYLOR[BF16] * ordered[kept]:
                assert torch.equal(top_units(fine, kept), top_units(want, kept))


@gpu_backends
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dtypes(backend, shape, axis):
    need(backend, "taylor_importance")
    mixes = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (BF16, BF16, F32), (F16, F32, F32)]
    if backend == "triton":
        mixes += [(F32, BF16, F16)]
    for number, dtypes in enumerate(mixes):
        assert_right(backend, (*operands(shape, dtypes, number), axis, "mixed", 1))


def test_the_cuda_kernels_take_what_they_say():
    need("cuda", "taylor_importance")
    for weight in DTYPES:
        for grad in DTYPES:
            for fisher in DTYPES:
                made = operands((64, 96), (weight, grad, fisher))
                if (weight, grad, fisher) in NARROW:
                    assert_right("cuda", (*made, 0, "mixed", 8))
                else:
                    with pytest.raises(BackendError, match="it takes torch"):
                        raw_taylor("cuda", *made, 0, "mixed", 8)
                    assert ops.choose("taylor_importance", None, *made) != "cuda"


@gpu_backends
@pytest.mark.parametrize("layout", ["transposed", "padded", "stepped", "one-row", "one-column", "one-element"])
@pytest.mark.parametrize("axis", [0, 1])
def test_layouts(backend, layout, axis):
    """NaN lies around the views; the operands' layouts may also differ from one another."""
    need(backend, "taylor_importance")
    shape = (4403, 4097) if layout in ("transposed", "padded") else (1024, 2047)
    made = operands(shape, layout=layout)
    assert_right(backend, (*made, axis, "mixed", 1))
    contiguous = tuple(x.contiguous() for x in made)
    assert_right(backend, (made[0], contiguous[1], made[2], axis, "mixed", 1))
    assert_right(backend, (contiguous[0], made[1], None, axis, "first", shape[axis]))


@gpu_backends
@pytest.mark.parametrize(
    "shape", [(0, 64), (64, 0), (1, 1), (1, 100003), (100003, 1), (3, 1 << 20), (1 << 20, 3)], ids=str
)
def test_odd_shapes(backend, shape):
    need(backend, "taylor_importance")
    made = operands(shape)
    for axis in (0, 1):
        for group_size in {1, max(1, shape[axis])}:
            assert_right(backend, (*made, axis, "mixed", group_size))


@gpu_backends
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_units_of_half_a_million_weights(backend, layout):
    need(backend, "taylor_importance")
    weight, grad, _ = operands((64 * 512, 1024), layout=layout)
    assert_right(backend, (weight, grad, None, 0, "first", 512))
    assert_right(backend, (weight.t(), grad.t(), None, 1, "first", 512))
    tenth = torch.full((4, 1 << 22), 0.1, device=DEVICE)  # rounding errors that all point one way
    assert_right(backend, (tenth, tenth, None, 0, "first", 2))
    assert_right(backend, (tenth.t().contiguous(), tenth.t().contiguous(), None, 1, "first", 2))


@gpu_backends
def test_whole_numbers_are_exact(backend):
    need(backend, "taylor_importance")
    weight, grad, fisher = ((4 * values((1031, 515), seed=i)).round().clamp(-4, 4) for i in range(3))
    for axis in (0, 1):
        for order in ORDERS:
            arguments = (*of_order(order, weight, grad, fisher), axis, order, 1)
            fine, signed = raw_taylor(backend, *arguments)
            want = reference.taylor_importance_fp64(*arguments)
            assert torch.equal(fine.double(), want[0])
            assert torch.equal(signed.double(), want[1])


@gpu_backends
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group_size", [1, 128])
def test_the_same_input_gives_the_same_bits(backend, axis, group_size):
    need(backend, "taylor_importance")
    weight, grad, fisher = operands((11008, 4096))
    first = raw_taylor(backend, weight, grad, fisher, axis, "mixed", group_size)
    moved = tuple(x.clone() for x in (weight, grad, fisher))
    for repeat in range(6):
        noise = torch.empty(1 << (18 + repeat), device=DEVICE).fill_(float("nan"))  # other addresses, other leftovers
        again = raw_taylor(backend, *(moved if repeat % 2 else (weight, grad, fisher)), axis, "mixed", group_size)
        assert torch.equal(bits(first[0]), bits(again[0]))
        assert torch.equal(bits(first[1]), bits(again[1]))
        del noise
    assert first[0].isfinite().all()


@gpu_backends
def test_coupled_matrices_add_up_in_out(backend):
    """The attention of a grouped-query layer: 8 KV groups of 4 query heads of 128."""
    need(backend, "taylor_importance")
    coupled = [((4096, 4096), 0, 512), ((1024, 4096), 0, 128), ((1024, 4096), 0, 128), ((4096, 4096), 1, 512)]
    for order in ORDERS:
        (fine, fine_whole), (signed, signed_whole) = (guarded(8, DEVICE, 0.0) for _ in range(2))
        want_fine, want_signed, scale = (torch.zeros(8, dtype=torch.float64, device=DEVICE) for _ in range(3))
        for number, (shape, axis, group_size) in enumerate(coupled):
            weight, grad, fisher = of_order(order, *operands(shape, seed=number))
            options = {"axis": axis, "order": order, "group_size": group_size}
            result = ops.taylor_importance(weight, grad, fisher, **options, out=(fine, signed), backend=backend)
            assert result.fine is fine
            more = reference.taylor_importance_fp64(weight, grad, fisher, **options)
            want_fine += more[0]
            want_signed += more[1]
            scale += magnitude(weight, grad, fisher, **options)
            assert_sums(fine, signed, (want_fine, want_signed), scale, BF16)
        assert untouched(fine_whole)
        assert untouched(signed_whole)


@gpu_backends
def test_work_stays_on_the_current_stream(backend):
    """The operands arrive late on a side stream; a launch on another stream would read the zeros before them."""
    need(backend, "taylor_importance")
    weight, grad, _ = operands((4096, 4096))
    keep = torch.arange(0, 4096, 3, device=DEVICE)
    ops.taylor_importance(weight, grad, axis=1, group_size=4, backend=backend)  # compiled before it matters
    ops.compact(weight, keep, backend=backend)
    late_weight, late_grad = torch.zeros_like(weight), torch.zeros_like(grad)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late_weight.copy_(weight)
        late_grad.copy_(grad)
        got = ops.taylor_importance(late_weight, late_grad, axis=1, group_size=4, backend=backend)
        torch.cuda._sleep(100_000_000)
        late_weight.mul_(2.0)
        cut = ops.compact(late_weight, keep, backend=backend)
    stream.synchronize()
    want = reference.taylor_importance_fp64(weight, grad, None, 1, "first", 4)
    assert_sums(*got, want, want[0], BF16)
    assert torch.equal(cut, 2.0 * weight[keep])


@gpu_backends
def test_a_gpu_that_is_not_the_current_one(backend):
    need(backend, "taylor_importance")
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    weight, grad, _ = (x.to("cuda:1") for x in operands((1000, 1200)))
    with torch.cuda.device(0):
        got = ops.taylor_importance(weight, grad, axis=0, group_size=8, backend=backend)
        cut = ops.compact(weight, torch.tensor([1, 5, 999]), backend=backend)
    want = reference.taylor_importance_fp64(weight, grad, None, 0, "first", 8)
    assert got.fine.device == weight.device
    assert_sums(*got, want, want[0], BF16)
    assert torch.equal(cut, weight[[1, 5, 999]])


@pytest.fixture(scope="module")
def huge():
    """More elements than 32 bits count: bf16 weights and gradients, and their sums by rows and columns in float64."""
    rows, columns, step = 65536, 40000, 2048
    weight, grad = (torch.empty((rows, columns), dtype=BF16, device=DEVICE) for _ in range(2))
    assert weight.numel() > 1 << 31
    generator = torch.Generator(DEVICE).manual_seed(0)
    sums = {}
    for axis, length in ((0, rows), (1, columns)):
        sums[axis] = tuple(torch.zeros(length, dtype=torch.float64, device=DEVICE) for _ in range(2))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        weight[part].normal_(generator=generator)
        grad[part].normal_(generator=generator)
        terms = weight[part].double() * grad[part].double()
        sums[0][0][part], sums[0][1][part] = terms.abs().sum(1), terms.sum(1)
        sums[1][0].add_(terms.abs().sum(0))
        sums[1][1].add_(terms.sum(0))
    return weight, grad, sums


@gpu_backends
@pytest.mark.parametrize(("axis", "group_size"), [(0, 1), (0, 512), (1, 1), (1, 500)])
def test_more_than_two_to_the_31_elements(backend, huge, axis, group_size):
    need(backend, "taylor_importance")
    weight, grad, sums = huge
    want = tuple(x.view(-1, group_size).sum(1) for x in sums[axis])
    fine, signed = raw_taylor(backend, weight, grad, None, axis, "first", group_size)
    assert_sums(fine, signed, want, want[0], BF16)
    fine, signed = raw_taylor(backend, weight.t(), grad.t(), None, 1 - axis, "first", group_size)
    assert_sums(fine, signed, want, want[0], BF16)


@gpu_backends
def test_cutting_more_than_two_to_the_31_elements(backend, huge):
    need(backend, "compact")
    weight = huge[0]
    rows = torch.tensor([0, 1, 40000, 65534, 65535])
    assert torch.equal(ops.compact(weight, rows, backend=backend), weight[rows.to(DEVICE)])
    columns = torch.tensor([0, 3, 39999])
    assert torch.equal(ops.compact(weight, columns, 1, backend=backend), weight[:, columns.to(DEVICE)])
    most = torch.arange(1, 65536)  # the result passes 32 bits as well
    cut = ops.compact(weight, most, backend=backend)
    assert torch.equal(cut, weight[1:])
    del cut
    most = torch.arange(1, 40000)
    cut = ops.compact(weight, most, 1, backend=backend)
    assert torch.equal(cut, weight[:, 1:])


@gpu_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("on", ["cpu", DEVICE])
def test_compact(backend, dtype, axis, on):
    """80 % of the rows or columns of a LLaMA-7B MLP, with `keep` on either side."""
    need(backend, "compact")
    weight = values((11008, 4096), dtype)
    size = weight.shape[axis]
    keep = torch.rand(size, generator=torch.Generator().manual_seed(1)).topk(size * 4 // 5).indices.sort().values
    want = weight.index_select(axis, keep.to(DEVICE))
    got = ops.compact(weight, keep.to(on), axis, backend=backend)
    assert got.is_contiguous()
    assert torch.equal(bits(got), bits(want))
    whole = torch.full((want.numel() + 2 * GUARD,), float("nan"), dtype=dtype, device=DEVICE)
    out = whole[GUARD:-GUARD].view(want.shape)
    assert ops.compact(weight, keep.to(on), axis, out=out, backend=backend) is out
    assert torch.equal(bits(out), bits(want))
    assert whole[:GUARD].isnan().all()
    assert whole[-GUARD:].isnan().all()
    vector = weight[:, 0] if axis == 0 else weight[0]
    assert torch.equal(ops.compact(vector, keep.to(on), backend=backend), vector[keep.to(DEVICE)])


@gpu_backends
@pytest.mark.parametrize("layout", ["transposed", "padded", "stepped", "one-row", "one-column"])
@pytest.mark.parametrize("axis", [0, 1])
def test_compact_of_views(backend, layout, axis):
    need(backend, "compact")
    for dtype in (F32, BF16):
        for shape in ((1031, 777), (512, 1024)):
            weight = lay(values(shape, dtype), layout)
            keep = (torch.arange(shape[axis], device=DEVICE) % 3 != 1).nonzero()[:, 0]
            got = ops.compact(weight, keep, axis, backend=backend)
            assert torch.equal(bits(got), bits(weight.index_select(axis, keep)))


@gpu_backends
def test_compact_refuses_and_bears_little(backend):
    need(backend, "compact")
    weight = values((64, 96))
    for keep in ([3, 2], [2, 2], [-1, 4], [0, 64]):
        for device in ("cpu", DEVICE):
            with pytest.raises(UsageError, match="keep: expected strictly increasing indices"):
                ops.compact(weight, torch.tensor(keep, device=device), backend=backend)
    assert ops.compact(weight, torch.empty(0, dtype=torch.int64), 1, backend=backend).shape == (64, 0)
    assert ops.compact(weight[:, :0], torch.tensor([1, 3]), backend=backend).shape == (2, 0)
    assert torch.equal(ops.compact(weight, torch.arange(64), backend=backend), weight)


@pytest.mark.parametrize("units", [1, 2, 33, 1024, 11008, 250007])
def test_attention_fusion(units):
    need("triton", "attention_fusion")
    fine, coarse = values(units, seed=1).exp(), (values(units, seed=1) + values(units, seed=2)).exp()
    if units > 2:
        fine[units // 3] = 0.0
    for temperature in (0.1, 1.0, 7.3):
        score, weight = raw_fusion("triton", fine, coarse, temperature)
        assert_fused(score, weight, reference.attention_fusion_fp64(fine, coarse, temperature))
        again = raw_fusion("triton", fine, coarse, temperature)
        assert torch.equal(bits(score), bits(again[0]))
    fine[units // 2] = float("nan")
    score, weight = raw_fusion("triton", fine, coarse, 1.0)
    assert score.isnan().all()
    assert weight.isnan().all()


def test_the_automatic_choice():
    """The best backend that is on, and its answer is right."""
    on = {a.name for a in ops.availability() if a.on}
    weight, grad, fisher = operands((512, 768))
    first = next(b for b in ("cuda", "triton", "reference") if b in on)
    assert ops.choose("taylor_importance", None, weight, grad, fisher) == first
    assert ops.choose("compact", None, weight) == first
    assert ops.choose("attention_fusion", None, weight) == ("triton" if "triton" in on else "reference")
    got = ops.taylor_importance(weight, grad, fisher, axis=0, order="second", group_size=64)
    want = reference.taylor_importance_fp64(weight, None, fisher, 0, "second", 64)
    assert_sums(*got, want, want[0], BF16)


def test_compiled_by_inductor():
    """All three ops, with and without `out`, in one graph of the default compiler."""

    def everything(w, g, f, keep):
        signed = ops.taylor_importance(w, g, axis=0, group_size=8).signed
        fine, other = torch.zeros(128, device=w.device), torch.zeros(128, device=w.device)
        ops.taylor_importance(w, g, f, axis=0, order="mixed", group_size=8, out=(fine, other))
        ops.taylor_importance(w.t(), g.t(), f.t(), axis=1, order="mixed", group_size=8, out=(fine, other))
        fused = ops.attention_fusion(fine, signed.abs())
        cut = ops.compact(w, keep, 1)
        return fine, other, fused.score, fused.weight, cut + 1.0

    made = (*operands((1024, 2048)), torch.arange(0, 2048, 3, device=DEVICE))
    want = everything(*made)
    torch._dynamo.reset()
    got = torch.compile(everything, fullgraph=True)(*made)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert (got[2] - want[2]).abs().max() <= 1e-5
    assert (got[3] - want[3]).abs().max() <= 1e-5
    assert torch.equal(got[4], want[4])
    alone = reference.taylor_importance_fp64(*made[:3], 0, "mixed", 8)
    scale = 2 * magnitude(*made[:3], 0, "mixed", 8)
    assert_sums(got[0], got[1], (2 * alone[0], 2 * alone[1]), scale, BF16)


@gpu_backends
def test_a_bare_kernel_call_overwrites_or_adds_as_told(backend):
    """`accumulate` decides, whatever the outputs held."""
    need(backend, "taylor_importance")
    weight, grad, _ = operands((256, 333))
    run = implementation("taylor_importance", backend, weight, grad, None)
    fine, signed = torch.full((64,), 1e9, device=DEVICE), torch.full((64,), -1e9, device=DEVICE)
    want = reference.taylor_importance_fp64(weight, grad, None, 0, "first", 4)
    call = TaylorCall(weight, grad, None, 0, "first", 4)
    run(call, fine, signed, False)
    assert_sums(fine, signed, want, want[0], BF16)
    run(call, fine, signed, True)
    assert_sums(fine, signed, (2 * want[0], 2 * want[1]), 2 * want[0], BF16)


@pytest.mark.parametrize("backend", ["triton", "cuda", None])
def test_a_model_is_scored_and_cut_as_on_the_cpu(backend):
    """Statistics within 1e-3 of the CPU's; the pruned model is the masked one within 1e-4."""
    if backend is not None:
        need(backend, "taylor_importance")
    more = {"head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.15, "tie_word_embeddings": False}
    model = random_model(**sizes(320, 96, 208, layers=3, heads=6, kv_heads=3), **more)
    tokens = torch.randint(0, 320, (4, 33), generator=torch.Generator().manual_seed(1))
    on_cpu = hk.calibrate(model, tokens, backend="reference")
    model.to(DEVICE)
    on_gpu = hk.calibrate(model, tokens, backend=backend)
    assert on_gpu.record["device"].startswith(DEVICE)
    assert on_gpu.groups == on_cpu.groups
    compared = 0
    for group in on_cpu.groups:
        coarse = on_cpu.coarse[group.name]
        assert float((on_gpu.coarse[group.name] - coarse).abs().max() / coarse.abs().max()) <= 1e-3
        for order in ORDERS:
            fine = on_cpu.fine[group.name][order].double()
            assert error(on_gpu.fine[group.name][order], fine, fine) <= 1e-3
            compared += 1
    assert compared == 3 * len(on_cpu.groups) == 18

    plan = hk.plan(hk.fuse(on_gpu), group_ratio=0.4, align=4)
    masked = copy.deepcopy(model)
    hk.mask(masked, plan)
    with torch.no_grad():
        before, want = (m(tokens.to(DEVICE)).logits for m in (model, masked))
        hk.prune(model, plan, backend=backend)
        got = model(tokens.to(DEVICE)).logits
    assert relative(want, before) > 1e-2
    assert relative(got, want) <= 1e-4
    assert model.model.layers[1].mlp.up_proj.weight.shape[0] < 208
    assert model.model.layers[1].mlp.up_proj.weight.device.type == DEVICE
