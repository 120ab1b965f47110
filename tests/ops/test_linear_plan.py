"""How `linear_importance` on Hopper is cut: the tiles keep the GPU full whatever the number of samples."""

from __future__ import annotations

import pytest
import torch

from hywia_kernels.ops import cuda_linear
from hywia_kernels.ops.calls import LinearCall
from hywia_kernels.ops.native import extension

pytestmark = pytest.mark.skipif(isinstance(extension("_cuda"), ImportError), reason="the CUDA extension was not built")

CLUSTERS = 66  # of two blocks, that 132 multiprocessors hold
# (rows, columns, axis) of LLaMA-7B and 70B: q, k, v; o; gate, up; down.
SHAPES = {
    "7B": [(4096, 4096, 0), (4096, 4096, 1), (11008, 4096, 0), (4096, 11008, 1)],
    "70B": [(8192, 8192, 0), (1024, 8192, 0), (8192, 8192, 1), (28672, 8192, 0), (8192, 28672, 1)],
}
SAMPLES = (10, 96, 128, 505, 506, 512, 1024)


def call(shape, samples, order="all", mapped=False, per_sample=True, length=128, offsets=None):
    rows, columns, axis = shape
    offsets = offsets or list(range(0, samples * length + 1, length))

    def made(*size):
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    tokens = offsets[-1]
    of_mapped = made(tokens, shape[axis]) if mapped else None
    operands = made(tokens, rows), made(tokens, columns), made(rows, columns)
    return LinearCall(*operands, offsets, axis, order, 1, per_sample, 1.0, of_mapped)


def cut(*arguments, **options):
    return cuda_linear.shape_of(call(*arguments, **options)).cut(CLUSTERS)


def full(made):
    """The share of the clusters' steps that have a tile to work on."""
    return made["m_tiles"] * made["n_tiles"] / (CLUSTERS * made["steps"])


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize(("order", "mapped"), [("all", True), ("all", False), ("second", False), ("first", False)])
@pytest.mark.parametrize("shape", [s for model in SHAPES.values() for s in model], ids=str)
def test_hardly_a_tile_is_missing(shape, order, mapped, samples):
    made = cut(shape, samples, order, mapped)
    assert full(made) >= 0.94
    assert made["across"] * made["share"] <= CLUSTERS
    assert made["floats"] * 4 <= 600 << 20


@pytest.mark.parametrize("shape", SHAPES["7B"], ids=str)
def test_signed_sums_that_come_from_elsewhere_do_not_change_the_cut(shape):
    cuts = {samples: cut(shape, samples, mapped=True) for samples in SAMPLES}
    assert len({(c["across"], c["share"], c["steps"]) for c in cuts.values()}) == 1
    units = 256 * cuts[512]["m_tiles"]
    # Three fine rows for each cluster of a row of tiles, and one table of the samples' sums.
    assert cuts[512]["floats"] == 3 * units * cuts[512]["share"] + 512 * units


def test_a_budget_as_small_as_it_was_leaves_a_third_of_the_gpu_idle(monkeypatch):
    """What the budget is for: at 506 samples it once cut the matrix in two shares alone."""
    monkeypatch.setattr(cuda_linear, "_TABLE_BYTES", 64 << 20)
    few, many = (cut((11008, 4096, 0), samples) for samples in (128, 512))
    assert full(few) >= 0.94
    assert (many["share"], many["steps"]) == (2, 32)
    assert full(many) == pytest.approx(43 * 32 / (66 * 32))


@pytest.mark.parametrize(
    ("order", "mapped", "per_sample", "n_tiles", "fine_rows"),
    [
        ("all", True, True, 32, 3),
        ("all", False, True, 32, 3),
        ("mixed", False, True, 32, 3),
        ("first", False, True, 32, 1),
        ("first", True, True, 16, 2),  # one product over all tokens
        ("first", False, False, 16, 2),
        ("second", False, True, 16, 1),  # reduced inside the sample
        ("second", True, True, 16, 1),
    ],
)
def test_the_form_that_a_call_takes(order, mapped, per_sample, n_tiles, fine_rows):
    made = cut((11008, 4096, 0), 10, order, mapped, per_sample)
    assert (made["m_tiles"], made["n_tiles"], made["fine_rows"]) == (43, n_tiles, fine_rows)


def test_long_samples_are_cut_for_their_products():
    assert cut((4096, 4096, 0), 1, mapped=True, length=2048)["signed_slots"] == 16
    assert cut((11008, 4096, 0), 10, mapped=True)["signed_slots"] == 1


def walked(made):
    """Tiles `(m, n, share's place, fresh, last)` of every cluster, as `Walk` in csrc/linear_tiles.cuh goes."""
    m_tiles, n_tiles, across, share = (made[name] for name in ("m_tiles", "n_tiles", "across", "share"))
    groups = -(-m_tiles // across)
    for cluster in range(across * share):
        lane_m, lane_n = cluster % across, cluster // across
        for step in range(lane_n, groups * n_tiles, share):
            m, n = step // n_tiles * across + lane_m, step % n_tiles
            if m >= m_tiles:
                break
            yield m, n, lane_n, n < share, n + share >= n_tiles


@pytest.mark.parametrize("samples", [10, 512])
@pytest.mark.parametrize("shape", [*SHAPES["7B"], (28672, 8192, 0), (129, 700, 0), (300, 50, 1)], ids=str)
def test_every_tile_is_walked_once_and_every_table_begun_and_ended_once(shape, samples):
    """A cluster's sums of a row of tiles begin with what the table held before it, which is anything, replaced."""
    for order in ("second", "all"):
        made = cut(shape, samples, order)
        tiles = list(walked(made))
        assert sorted((m, n) for m, n, *_ in tiles) == [
            (m, n) for m in range(made["m_tiles"]) for n in range(made["n_tiles"])
        ]
        every = {(m, s) for m in range(made["m_tiles"]) for s in range(made["share"])}
        for which in (3, 4):
            found = [(t[0], t[2]) for t in tiles if t[which]]
            assert len(found) == len(set(found))
            assert set(found) == every
        begun = set()
        for m, _, s, fresh, _ in tiles:
            assert fresh == ((m, s) not in begun)
            begun.add((m, s))
