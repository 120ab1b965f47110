"""Compaction copies: every backend gives `index_select`'s bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from hywia_kernels import UsageError, ops
from hywia_kernels.ops import BACKENDS
from hywia_kernels.ops.checks import DTYPES
from hywia_kernels.ops.registry import implementation
from tests.support.operands import LAYOUTS, SIZES, bits, generator, lay, need, possible, run_examples

OP = "compact"
every_backend = pytest.mark.parametrize("backend", BACKENDS)
GUARD = 16


def any_bits(shape, dtype, seed=0):
    """Every bit pattern there is: NaN payloads, infinities, subnormals and negative zeros must survive."""
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(whole)
    made = torch.randint(info.min, info.max + 1, shape, generator=generator(seed), dtype=torch.int64)
    return made.to(whole).view(dtype)


def raw_compact(backend, weight, keep, axis):
    """The backend's own function, into the middle of memory that must not change."""
    shape = list(weight.shape)
    shape[axis] = keep.numel()
    count = torch.Size(shape).numel()
    whole = torch.full((count + 2 * GUARD,), -7.0, dtype=weight.dtype, device=weight.device)
    out = whole[GUARD : GUARD + count].view(shape)
    implementation(OP, backend, weight)(weight, keep, axis, out)
    assert (whole[:GUARD] == -7.0).all()
    assert (whole[GUARD + count :] == -7.0).all()
    return out


@st.composite
def cuts(draw):
    """(weight, keep, axis): matrices in every layout, and vectors."""
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1 << 20))
    rows, columns = draw(SIZES), draw(SIZES)
    if draw(st.booleans()) and draw(st.booleans()):
        step = draw(st.sampled_from((1, 3)))
        weight, axis = any_bits((columns * step,), dtype, seed)[::step], 0
    else:
        layout = draw(st.sampled_from(LAYOUTS))
        weight = lay(any_bits((rows, columns), dtype, seed), layout if possible(layout, (rows, columns)) else "")
        axis = draw(st.sampled_from((0, 1)))
    share = draw(st.sampled_from((0.0, 0.3, 0.8, 1.0)))
    keep = (torch.rand(weight.shape[axis], generator=generator(seed)) < share).nonzero()[:, 0]
    return weight, keep, axis


def moved(weight, device):
    """To a device with its strides; `Tensor.to` would make a view dense."""
    if device == "cpu":
        return weight
    storage = torch.empty(0, dtype=weight.dtype).set_(weight.untyped_storage()).to(device)
    return torch.as_strided(storage, weight.shape, weight.stride(), weight.storage_offset())


@every_backend
def test_random_cuts(backend):
    device = need(backend, OP)

    def check(case):
        weight, keep, axis = case
        want = bits(weight).index_select(axis, keep)
        on_device = moved(weight, device)
        assert torch.equal(bits(raw_compact(backend, on_device, keep.to(device), axis)).cpu(), want)
        got = ops.compact(on_device, keep, axis, backend=backend)
        assert got.is_contiguous()
        assert got.dtype == weight.dtype
        assert torch.equal(bits(got).cpu(), want)

    run_examples(backend, cuts(), check)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_matrix_of_many_blocks(backend, dtype, axis):
    """Also with a row length and an offset that no 16-byte word divides."""
    device = need(backend, OP)
    for shape, start in (((256, 1536), 0), ((255, 1537), 0), ((256, 1536), 3)):
        held = any_bits((shape[0] * shape[1] + start,), dtype).to(device)
        weight = held[start:].view(shape)
        keep = (torch.arange(shape[axis]) % 5 != 2).nonzero()[:, 0]
        got = ops.compact(weight, keep, axis, backend=backend)
        assert torch.equal(bits(got), bits(weight).index_select(axis, keep.to(device)))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector(backend, dtype):
    device = need(backend, OP)
    bias = any_bits((4097,), dtype).to(device)
    keep = torch.arange(1, 4097, 3)
    assert torch.equal(bits(ops.compact(bias, keep, backend=backend)), bits(bias[1::3]))


@every_backend
@pytest.mark.parametrize(("shape", "axis", "empty"), [((4, 6), 0, (0, 6)), ((4, 6), 1, (4, 0)), ((5,), 0, (0,))])
def test_nothing_kept(backend, shape, axis, empty):
    device = need(backend, OP)
    got = ops.compact(torch.ones(shape, device=device), torch.empty(0, dtype=torch.int64), axis, backend=backend)
    assert got.shape == empty


@every_backend
@pytest.mark.parametrize("axis", [0, 1])
def test_everything_kept(backend, axis):
    device = need(backend, OP)
    weight = torch.randn(33, 65, generator=generator(1)).to(device)
    got = ops.compact(weight, torch.arange(weight.shape[axis]), axis, backend=backend)
    assert torch.equal(got, weight)
    assert got.data_ptr() != weight.data_ptr()


@every_backend
def test_keep_in_any_layout(backend):
    device = need(backend, OP)
    weight = torch.randn(40, 8, generator=generator(1)).to(device)
    strided = torch.arange(40)[::3]
    assert torch.equal(ops.compact(weight, strided, backend=backend), weight[::3])
    assert torch.equal(ops.compact(weight, strided.to(device), backend=backend), weight[::3])
    assert torch.equal(ops.compact(weight, torch.tensor([7]).expand(1), backend=backend), weight[7:8])


@every_backend
@pytest.mark.parametrize("axis", [0, 1])
def test_out(backend, axis):
    device = need(backend, OP)
    weight = torch.randn(12, 20, generator=generator(1)).to(device)
    keep = torch.tensor([1, 2, 5, 11])
    whole = torch.full((6 * 20 * 12,), float("nan"), device=device)
    shape = (4, 20) if axis == 0 else (12, 4)
    count = shape[0] * shape[1]
    out = whole[3 : 3 + count].view(shape)  # not aligned to 16 bytes
    assert ops.compact(weight, keep, axis, out=out, backend=backend) is out
    assert torch.equal(out, weight.index_select(axis, keep.to(device)))
    assert whole[:3].isnan().all()
    assert whole[3 + count :].isnan().all()


BAD = [
    ([2, 1], r"\[0, 6\), got indices out of order"),
    ([1, 1], "got indices out of order"),
    ([0, 3, 2, 5], "got indices out of order"),
    ([-1, 2], r"\[0, 6\), got a range of \[-1, 2\]"),
    ([0, 6], r"\[0, 6\), got a range of \[0, 6\]"),
    ([1 << 40], r"got a range of \[1099511627776, 1099511627776\]"),
]


@every_backend
@pytest.mark.parametrize(("keep", "message"), BAD)
@pytest.mark.parametrize("axis", [0, 1])
def test_bad_keep(backend, keep, message, axis):
    """Caught before anything is read or written."""
    device = need(backend, OP)
    weight = torch.ones((6, 9) if axis == 0 else (9, 6), device=device)
    with pytest.raises(UsageError, match=f"^keep: expected strictly increasing indices within .*{message}"):
        ops.compact(weight, torch.tensor(keep), axis, backend=backend)
    out = torch.full((len(keep), 9) if axis == 0 else (9, len(keep)), 5.0, device=device)
    with pytest.raises(UsageError, match="sort and deduplicate them"):
        ops.compact(weight, torch.tensor(keep, device=device), axis, out=out, backend=backend)
    assert (out == 5.0).all()
    with pytest.raises(UsageError, match="keep: expected strictly"):
        ops.compact(torch.ones(6, device=device), torch.tensor(keep), backend=backend)


@every_backend
def test_a_parameter_may_be_cut(backend):
    """None of the ops is differentiable: the result takes no part in autograd."""
    device = need(backend, OP)
    parameter = torch.nn.Parameter(torch.randn(8, 4, generator=generator(1)).to(device))
    keep = torch.tensor([0, 3, 7])
    got = ops.compact(parameter, keep, backend=backend)
    assert not got.requires_grad
    assert torch.equal(got, parameter.detach()[keep.to(device)])
    out = torch.empty(3, 4, device=device)
    ops.compact(parameter, keep, out=out, backend=backend)
    assert not out.requires_grad
    assert torch.equal(out, got)


@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_two_to_the_31(axis):
    """Kept rows or columns 2^30 elements apart. Of the gigabytes behind them only the touched pages exist."""
    need("native", OP)
    far = 1 << 30
    storage = torch.empty(3 * far + 256, dtype=torch.bfloat16)
    rows = torch.as_strided(storage, (4, 200), (far, 1)).copy_(any_bits((4, 200), torch.bfloat16))
    weight = rows if axis == 0 else rows.t()
    for along, keep in ((axis, [0, 3]), (axis, [1, 2, 3]), (1 - axis, [0, 7, 199])):
        chosen = torch.tensor(keep)
        want = bits(weight).index_select(along, chosen)
        assert torch.equal(bits(ops.compact(weight, chosen, along, backend="native")), want)
    column = storage[::far]
    assert torch.equal(bits(ops.compact(column, torch.tensor([0, 2, 3]), backend="native")), bits(column)[[0, 2, 3]])


def test_indices_beyond_two_to_the_31():
    """A broadcast vector and matrix of 2^33 entries take no memory."""
    need("native", OP)
    keep = torch.tensor([5, 1 << 31, (1 << 33) - 1])
    vector = torch.tensor([1.5]).expand(1 << 33)
    assert ops.compact(vector, keep, backend="native").tolist() == [1.5] * 3
    matrix = torch.tensor([[1.5], [-2.0]]).expand(2, 1 << 33)
    assert ops.compact(matrix, keep, 1, backend="native").tolist() == [[1.5] * 3, [-2.0] * 3]
