"""Fusion: every backend against the float64 reference, and the properties that its documentation states."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from hywia_kernels import ops
from hywia_kernels.ops import BACKENDS, reference
from tests.support.operands import bits, generator, guarded, need, raw_fusion, run_examples, untouched
from tests.support.tolerances import FUSION, assert_fused

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NaN in the interpreter's numpy
OP = "attention_fusion"
every_backend = pytest.mark.parametrize("backend", BACKENDS)
NAN, INF = float("nan"), float("inf")


def estimates(units, seed=0, device="cpu"):
    """Two log-normal estimates, correlated as the two grains are."""
    common = torch.randn(units, generator=generator(seed))
    return tuple((common + 0.7 * torch.randn(units, generator=generator(seed + i))).exp().to(device) for i in (1, 2))


@st.composite
def fusions(draw):
    """(fine, coarse, temperature): any length, spans of many decades, some units dead."""
    units = draw(st.one_of(st.integers(0, 70), st.sampled_from((1023, 1024, 1025))))
    seed = draw(st.integers(0, 1 << 20))
    pair = []
    for i in range(2):
        x = torch.randn(units, generator=generator(seed + i)) * draw(st.sampled_from((0.1, 1.0, 8.0)))
        x = x.exp() * draw(st.sampled_from((1e-18, 1e-6, 1.0, 1e9)))
        dead = draw(st.sampled_from((0.0, 0.2, 1.0)))
        pair.append(x.masked_fill(torch.rand(units, generator=generator(seed + 2 + i)) < dead, 0.0))
    return pair[0], pair[1], draw(st.sampled_from((1e-2, 0.5, 1.0, 2.0, 3.7, 1e3)))


@every_backend
def test_random_estimates(backend):
    device = need(backend, OP)

    def check(case):
        fine, coarse, temperature = case[0].to(device), case[1].to(device), case[2]
        score, weight = raw_fusion(backend, fine, coarse, temperature)
        assert_fused(score, weight, reference.attention_fusion_fp64(fine, coarse, temperature))
        assert ((weight >= 0) & (weight <= 1)).all()

    run_examples(backend, fusions(), check)


@every_backend
def test_many_units(backend):
    """More than one block of every kernel."""
    device = need(backend, OP)
    fine, coarse = estimates(11008, device=device)
    score, weight = raw_fusion(backend, fine, coarse, 1.0)
    assert_fused(score, weight, reference.attention_fusion_fp64(fine, coarse, 1.0))
    assert 0.1 < weight.std() < 0.5  # the blend does adapt


@every_backend
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.25])
def test_two_units_by_hand(backend, temperature):
    """Two distinct values standardise to +1 and -1, whatever they are."""
    device = need(backend, OP)
    up, down, flat = (torch.tensor(x, device=device) for x in ([7.0, 0.5], [1e-4, 2e-3], [3.0, 3.0]))

    def fused(fine, coarse):
        got = ops.attention_fusion(fine, coarse, temperature=temperature, backend=backend)
        return [x.tolist() for x in got]

    # Agreement: m = ±1, both tokens equal: an even blend of equal numbers.
    assert fused(up, up * 5) == [pytest.approx([1.0, -1.0], abs=FUSION), pytest.approx([0.5, 0.5], abs=FUSION)]
    # Contradiction: m = 0: an even blend of +1 and -1.
    assert fused(up, down) == [pytest.approx([0.0, 0.0], abs=FUSION), pytest.approx([0.5, 0.5], abs=FUSION)]
    # A silent partner: z_c = 0, m = ±1/2, m·(z_f - z_c) = 1/2 for both units.
    leans = 1.0 / (1.0 + math.exp(-0.5 / temperature))
    both = pytest.approx([leans, leans], abs=FUSION)
    assert fused(up, flat) == [pytest.approx([leans, -leans], abs=FUSION), both]
    # The same from the other side: the weight is the fine estimate's.
    other = pytest.approx([1.0 - leans, 1.0 - leans], abs=FUSION)
    assert fused(flat, up) == [pytest.approx([leans, -leans], abs=FUSION), other]


@every_backend
def test_three_units_by_hand(backend):
    """Logarithms 0, 1, 2 and 0, 0, 3: z = (-√1.5, 0, √1.5) and (-1, -1, 2)/√2."""
    device = need(backend, OP)
    fine = torch.tensor([0.0, 1.0, 2.0]).exp().to(device)
    coarse = torch.tensor([0.0, 0.0, 3.0]).exp().to(device)
    got = ops.attention_fusion(fine, coarse, backend=backend)
    for i in range(3):
        zf, zc = math.sqrt(1.5) * (i - 1), (-1, -1, 2)[i] / math.sqrt(2)
        weight = 1.0 / (1.0 + math.exp(-0.5 * (zf + zc) * (zf - zc)))
        assert float(got.weight[i]) == pytest.approx(weight, abs=FUSION)
        assert float(got.score[i]) == pytest.approx(weight * zf + (1 - weight) * zc, abs=FUSION)


@every_backend
def test_the_louder_grain_leads_at_the_top_and_the_lower_at_the_bottom(backend):
    device = need(backend, OP)
    fine, coarse = estimates(500, device=device)
    score, weight = ops.attention_fusion(fine, coarse, backend=backend)
    zf, zc = reference.standardised_log(fine), reference.standardised_log(coarse)
    clear = (zf - zc).abs() > 1e-3
    high, low = (zf > 0) & (zc > 0) & clear, (zf < 0) & (zc < 0) & clear
    assert torch.equal(weight[high] > 0.5, zf[high] > zc[high])
    assert torch.equal(weight[low] > 0.5, zf[low] < zc[low])
    assert min(high.sum(), low.sum()) > 100
    least, most = torch.minimum(zf, zc), torch.maximum(zf, zc)
    assert ((score >= least - 1e-5) & (score <= most + 1e-5)).all()


@every_backend
def test_a_constant_estimate_has_no_say(backend):
    """It gives z = 0: with both constant, every score is 0 and every blend even."""
    device = need(backend, OP)
    flat = torch.full((37,), 0.3, device=device)
    score, weight = ops.attention_fusion(flat, 1e-7 * flat, backend=backend)
    assert score.tolist() == [0.0] * 37
    assert weight.tolist() == [0.5] * 37
    fine, _ = estimates(37, device=device)
    score, weight = ops.attention_fusion(fine, flat, backend=backend)
    zf = reference.standardised_log(fine)
    assert_fused(score, weight, (torch.sigmoid(0.5 * zf * zf) * zf, torch.sigmoid(0.5 * zf * zf)))


@every_backend
def test_equal_estimates_blend_evenly(backend):
    device = need(backend, OP)
    fine, _ = estimates(65, device=device)
    score, weight = ops.attention_fusion(fine, fine.clone(), backend=backend)
    assert weight.tolist() == [0.5] * 65
    assert (score - reference.standardised_log(fine)).abs().max() <= 5 * FUSION


@every_backend
@pytest.mark.parametrize("values", [(3.0, 0.1), (0.0, 0.0), (0.0, 2.0), (1e-38, 1e38)])
def test_a_single_unit(backend, values):
    """One unit has no spread."""
    device = need(backend, OP)
    got = ops.attention_fusion(*(torch.tensor([v], device=device) for v in values), backend=backend)
    assert (got.score.tolist(), got.weight.tolist()) == ([0.0], [0.5])


@every_backend
def test_no_units(backend):
    device = need(backend, OP)
    got = ops.attention_fusion(torch.empty(0, device=device), torch.empty(0, device=device), backend=backend)
    assert got.score.shape == got.weight.shape == (0,)
    assert got.score.dtype == torch.float32


@every_backend
def test_dead_units_stay_finite_and_last(backend):
    device = need(backend, OP)
    fine, coarse = estimates(40, device=device)
    dead = torch.arange(40, device=device) % 4 == 0
    fine[dead] = 0.0
    coarse[dead] = 0.0
    score, weight = ops.attention_fusion(fine, coarse, backend=backend)
    assert_fused(score, weight, reference.attention_fusion_fp64(fine, coarse, 1.0))
    assert score.isfinite().all()
    assert score[dead].max() < score[~dead].min()
    assert score[dead].unique().numel() == 1
    zeros = torch.zeros_like(fine)
    score, weight = ops.attention_fusion(zeros, zeros, backend=backend)
    assert (score.tolist(), weight.tolist()) == ([0.0] * 40, [0.5] * 40)


@every_backend
def test_the_floor_is_a_trillionth_of_the_largest(backend):
    """Below it units are equal; just above they are not."""
    device = need(backend, OP)
    fine = torch.tensor([1.0, 0.5, 3e-12, 2e-13, 1e-20, 0.0], device=device)
    flat = torch.ones(6, device=device)
    score = ops.attention_fusion(fine, flat, backend=backend).score
    assert score[2] > score[3]
    assert score[3] == score[4] == score[5]


@every_backend
@pytest.mark.parametrize("factor", [2.0**-60, 0.37, 1e4, 2.0**40])
def test_scale_of_an_estimate_does_not_matter(backend, factor):
    device = need(backend, OP)
    fine, coarse = estimates(90, device=device)
    want = ops.attention_fusion(fine, coarse, backend=backend)
    for pair in ((fine * factor, coarse), (fine, coarse * factor), (fine * factor, coarse * factor)):
        got = ops.attention_fusion(*pair, backend=backend)
        assert (got.score - want.score).abs().max() <= 5 * FUSION  # the factor rounds the inputs
        assert (got.weight - want.weight).abs().max() <= 5 * FUSION


@every_backend
def test_permuted_units_give_permuted_scores(backend):
    device = need(backend, OP)
    fine, coarse = estimates(301, device=device)
    order = torch.randperm(301, generator=generator(5)).to(device)
    want = ops.attention_fusion(fine, coarse, backend=backend)
    got = ops.attention_fusion(fine[order].contiguous(), coarse[order].contiguous(), backend=backend)
    assert (got.score - want.score[order]).abs().max() <= FUSION
    assert (got.weight - want.weight[order]).abs().max() <= FUSION


@every_backend
def test_swapped_estimates_swap_the_weights(backend):
    device = need(backend, OP)
    fine, coarse = estimates(64, device=device)
    one, other = (ops.attention_fusion(*p, backend=backend) for p in ((fine, coarse), (coarse, fine)))
    assert (one.score - other.score).abs().max() <= FUSION
    assert (one.weight - (1.0 - other.weight)).abs().max() <= FUSION


@every_backend
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("units", [1, 5, 2000])
def test_what_is_not_finite_shows(backend, where, poison, units):
    """A NaN anywhere in an estimate makes its mean, and so every score, NaN. So does an infinity."""
    device = need(backend, OP)
    pair = estimates(units, device=device)
    pair[where][units // 2] = poison
    score, weight = raw_fusion(backend, *pair, 1.0)
    assert score.isnan().all()
    assert weight.isnan().all()


@every_backend
def test_temperature(backend):
    """Higher is closer to the plain mean; towards zero it is a hard choice of the louder grain."""
    device = need(backend, OP)
    fine, coarse = estimates(200, device=device)
    zf, zc = reference.standardised_log(fine), reference.standardised_log(coarse)
    mean = 0.5 * (zf + zc)
    distances = []
    for temperature in (0.1, 1.0, 10.0, 100.0):
        score, weight = ops.attention_fusion(fine, coarse, temperature=temperature, backend=backend)
        assert_fused(score, weight, reference.attention_fusion_fp64(fine, coarse, temperature))
        distances.append(float((score - mean).abs().mean()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 10 * distances[-1] > 0
    whole = ops.attention_fusion(fine, coarse, temperature=2, backend=backend)
    assert torch.equal(whole.score, ops.attention_fusion(fine, coarse, temperature=2.0, backend=backend).score)


@every_backend
@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e40, 1e300])
def test_temperatures_beyond_float32(backend, temperature):
    """Positive and finite is all that is asked of a temperature."""
    device = need(backend, OP)
    fine, coarse = estimates(50, device=device)
    coarse[:10] = fine[:10]
    score, weight = ops.attention_fusion(fine, coarse, temperature=temperature, backend=backend)
    assert_fused(score, weight, reference.attention_fusion_fp64(fine, coarse, temperature))
    flat = torch.ones(50, device=device)
    score, weight = ops.attention_fusion(flat, flat, temperature=temperature, backend=backend)
    assert (score.tolist(), weight.tolist()) == ([0.0] * 50, [0.5] * 50)


@every_backend
def test_out_is_overwritten_and_returned(backend):
    device = need(backend, OP)
    fine, coarse = estimates(77, device=device)
    want = ops.attention_fusion(fine, coarse, backend=backend)
    (score, score_whole), (weight, weight_whole) = (guarded(77, device) for _ in range(2))
    got = ops.attention_fusion(fine, coarse, out=(score, weight), backend=backend)
    assert got.score is score
    assert got.weight is weight
    assert torch.equal(score, want.score)
    assert torch.equal(weight, want.weight)
    assert untouched(score_whole)
    assert untouched(weight_whole)


@every_backend
def test_two_runs_give_the_same_bits(backend):
    device = need(backend, OP)
    fine, coarse = estimates(4099, device=device)
    one, two = (ops.attention_fusion(fine, coarse, backend=backend) for _ in range(2))
    assert torch.equal(bits(one.score), bits(two.score))
    assert torch.equal(bits(one.weight), bits(two.weight))


def test_the_number_of_threads_does_not_change_the_bits():
    need("native", OP)
    fine, coarse = estimates(50021)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(ops.attention_fusion(fine, coarse, backend="native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(bits(results[0].score), bits(other.score))
        assert torch.equal(bits(results[0].weight), bits(other.weight))


@every_backend
def test_inputs_stay_as_they_were_and_results_take_no_part_in_autograd(backend):
    device = need(backend, OP)
    fine, coarse = estimates(30, device=device)
    before = fine.clone(), coarse.clone()
    want = ops.attention_fusion(fine, coarse, backend=backend)
    got = ops.attention_fusion(fine.clone().requires_grad_(), coarse.clone().requires_grad_(), backend=backend)
    assert torch.equal(got.score, want.score)
    assert not got.score.requires_grad
    assert not got.weight.requires_grad
    assert torch.equal(fine, before[0])
    assert torch.equal(coarse, before[1])
