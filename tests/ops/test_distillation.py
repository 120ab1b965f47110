"""The distillation ops: every backend against autograd in float64, and what their contract says of odd tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from hywia_kernels import UsageError, ops
from hywia_kernels.ops import reference
from tests.support.distillation import PLAIN, Change, assert_near, exact, kept, logits_of
from tests.support.operands import bits, generator, lay, need, run_examples

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # what the interpreter's numpy masks
every_backend = pytest.mark.parametrize("backend", ["reference", "native", "triton"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 2, 7, 32, 33, 64, 257, 1024, 1031)
NAN = float("nan")


def device_of(backend, top=False):
    return need(backend, "top_distillation_gradient" if top else "distillation_gradient")


def options(labels=None, hard=0.0, student=PLAIN, teacher=None):
    made = {"labels": labels, "hard": hard, "student_scale": student.scale, "student_cap": student.cap}
    return made if teacher is None else {**made, "teacher_scale": teacher.scale, "teacher_cap": teacher.cap}


changes = st.builds(Change, st.sampled_from((1.0, 0.0625, 1.7)), st.sampled_from((None, None, 0.7, 30.0)))


@st.composite
def calls(draw, top=False):
    """Arguments of either op on the CPU, and those of `exact`."""
    tokens, words = draw(st.integers(0, 5)), draw(st.sampled_from(WIDTHS))
    seed, spread = draw(st.integers(0, 1 << 20)), draw(st.sampled_from((0.0, 0.1, 3.0, 12.0)))
    student = logits_of(tokens, words, draw(st.sampled_from(DTYPES)), seed, spread)
    teacher = logits_of(tokens, words, draw(st.sampled_from(DTYPES)), seed + 1, spread)
    weight = torch.rand(tokens, generator=generator(seed + 2)) * draw(st.sampled_from((1.0, 1e-4)))
    weight[draw(st.integers(0, 4)) :: 5] = 0.0
    hard = draw(st.sampled_from((0.0, 0.25, 1.0)))
    labels = torch.randint(0, words, (tokens,), generator=generator(seed + 3)) if hard else None
    change, theirs = draw(changes), draw(changes)
    if top:
        k = draw(st.sampled_from([k for k in (1, 2, 5, 64, words) if k <= words]))
        targets = kept(theirs(teacher), k, draw(st.sampled_from((torch.float32, torch.float16))))
    else:
        targets = lay(teacher, draw(st.sampled_from(("contiguous", "padded"))))
    layout = draw(st.sampled_from(("contiguous", "padded")))
    return lay(student, layout), targets, weight, labels, hard, change, theirs


def moved(value, device):
    return tuple(x.to(device) for x in value) if isinstance(value, tuple) else value.to(device)


@every_backend
@pytest.mark.parametrize("top", [False, True], ids=["all", "top"])
def test_random_calls(backend, top):
    device = device_of(backend, top)

    def check(call):
        student, targets, weight, labels, hard, change, theirs = call
        want = exact(student, targets, weight, labels, hard, change, theirs)
        want = want[0].masked_fill(weight == 0, 0.0), want[1]
        given = [moved(x, device) for x in (student, targets, weight)]
        arguments = options(labels if labels is None else labels.to(device), hard, change, None if top else theirs)

        def run(logits, **more):
            if top:
                return ops.top_distillation_gradient(logits, *given[1], given[2], **arguments, **more, backend=backend)
            return ops.distillation_gradient(logits, given[1], given[2], **arguments, **more, backend=backend)

        before = given[0].clone()
        out = lay(torch.full_like(student, NAN), "padded").to(device)
        got = run(given[0], out=out)
        assert got.gradient is out
        assert_near(_on_cpu(got), want, weight, backend, change.scale)
        other = DTYPES[DTYPES.index(student.dtype) - 1]
        apart = run(given[0], out=torch.full_like(given[0], NAN, dtype=other))
        assert (apart.gradient.dtype, torch.equal(apart.loss, got.loss)) == (other, True)
        assert_near(_on_cpu(apart), want, weight, backend, change.scale)
        losses = run(given[0], gradient=False)
        assert losses.gradient is None
        assert torch.equal(losses.loss, got.loss)
        assert torch.equal(given[0], before), "the logits are as they were"
        over = run(given[0])
        assert over.gradient is given[0]
        assert torch.equal(bits(over.gradient), bits(out))
        assert torch.equal(over.loss, got.loss)

    run_examples(backend, calls(top), check)


def _on_cpu(got):
    return type(got)(got.loss.cpu(), None if got.gradient is None else got.gradient.cpu())


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_words_than_a_block(backend, dtype):
    device = device_of(backend)
    student, teacher = (logits_of(3, 9001, dtype, seed) for seed in (1, 2))
    weight, labels = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0, 9000, 4096])
    want = exact(student, teacher, weight, labels, 0.2)
    got = ops.distillation_gradient(
        student.to(device), teacher.to(device), weight.to(device), labels=labels.to(device), hard=0.2, backend=backend
    )
    assert_near(_on_cpu(got), want, weight, backend)
    targets = kept(teacher.double(), 1500)
    student = logits_of(3, 9001, dtype, 1)
    want = exact(student, targets, weight, labels, 0.2)
    got = ops.top_distillation_gradient(
        student.to(device),
        *moved(targets, device),
        weight.to(device),
        labels=labels.to(device),
        hard=0.2,
        backend=backend,
    )
    assert_near(_on_cpu(got), want, weight, backend)


@every_backend
def test_two_words_by_hand(backend):
    """Probabilities 1/4 and 3/4 of the teacher, 1/2 and 1/2 of the student."""
    device = device_of(backend)
    student = torch.zeros(1, 2, device=device)
    teacher = torch.tensor([[0.0, math.log(3.0)]], device=device)
    weight, labels = torch.tensor([2.0], device=device), torch.tensor([0], device=device)
    got = ops.distillation_gradient(student, teacher, weight, labels=labels, hard=0.2, backend=backend)
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(got.loss) == pytest.approx(0.8 * divergence + 0.2 * math.log(2.0), rel=1e-6)
    assert got.gradient[0].tolist() == pytest.approx([2 * (0.5 - 0.8 * 0.25 - 0.2), 2 * (0.5 - 0.8 * 0.75)], rel=1e-6)


@every_backend
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("value", [0.0, 60.0, -60.0, 1e4, -1e4])
def test_equal_logits_cost_nothing(backend, value, cap):
    device = device_of(backend)
    same = logits_of(2, 77, torch.float32, 3).to(device) + value
    change = Change(1.0, cap)
    got = ops.distillation_gradient(
        same.clone(), same, torch.ones(2, device=device), **options(student=change, teacher=change), backend=backend
    )
    assert got.loss.abs().max() <= 1e-6
    assert got.gradient.abs().max() <= 1e-7


@every_backend
@pytest.mark.parametrize("top", [None, 3, 40])
@pytest.mark.parametrize("offsets", [(0.0, 0.0), (1e4, -1e4), (1e4, 1e4)], ids=str)
@pytest.mark.parametrize("spread", [3.0, 60.0, 1e4])
def test_extreme_logits(backend, spread, offsets, top):
    """Large logits, and offsets that a softmax does not see but float32 does: at 1e4 it steps by 1e-3."""
    device = device_of(backend, top is not None)
    student, teacher = (
        logits_of(4, 301, torch.float32, seed, spread) + o for seed, o in zip((5, 6), offsets, strict=True)
    )
    student[0, 7], teacher[0, 9] = student[0].max() + 60.0, teacher[0].max() + 60.0
    weight = torch.tensor([1.0, 0.5, 0.1, 1e-3])
    targets = teacher if top is None else kept(teacher.double(), top)
    want = exact(student, targets, weight)
    given = [moved(x, device) for x in (student, targets, weight)]
    if top is None:
        got = ops.distillation_gradient(*given, backend=backend)
    else:
        got = ops.top_distillation_gradient(given[0], *given[1], given[2], backend=backend)
    assert_near(_on_cpu(got), want, weight, backend)


@every_backend
@pytest.mark.parametrize("top", [False, True])
def test_tokens_of_no_weight_are_not_read(backend, top):
    device = device_of(backend, top)
    student, teacher = (logits_of(3, 40, torch.float32, seed) for seed in (1, 2))
    weight, labels = torch.tensor([1.0, 0.0, 2.0], device=device), torch.tensor([3, -100, 5], device=device)
    targets = kept(teacher.double(), 4)
    student[1] = teacher[1] = NAN
    targets[0][1] = -7
    given = student.to(device)
    if top:
        got = ops.top_distillation_gradient(
            given, *moved(targets, device), weight, labels=labels, hard=0.5, backend=backend
        )
    else:
        got = ops.distillation_gradient(given, teacher.to(device), weight, labels=labels, hard=0.5, backend=backend)
    assert float(got.loss[1]) == 0.0
    assert got.gradient[1].tolist() == [0.0] * 40
    assert (got.loss[::2] > 0.1).all()
    assert got.gradient[::2].abs().sum(1).min() > 0.1


@every_backend
@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("label", [-1, 40, 1 << 40])
def test_labels_that_are_no_words(backend, top, label):
    device = device_of(backend, top)
    student, teacher = (logits_of(2, 40, torch.float32, seed).to(device) for seed in (1, 2))
    weight, labels = torch.ones(2, device=device), torch.tensor([label, 3], device=device)
    targets = moved(kept(teacher.cpu().double(), 4), device)
    if top:
        got = ops.top_distillation_gradient(student, *targets, weight, labels=labels, hard=0.5, backend=backend)
    else:
        got = ops.distillation_gradient(student, teacher, weight, labels=labels, hard=0.5, backend=backend)
    assert got.loss.isnan().tolist() == [True, False]
    assert got.gradient.isnan().all(1).tolist() == [True, False]
    assert not got.gradient[1].isnan().any()


@every_backend
@pytest.mark.parametrize("index", [-1, 40, 1 << 30])
def test_indices_that_are_no_words(backend, index):
    device = device_of(backend, True)
    student, teacher = (logits_of(2, 40, torch.float32, seed) for seed in (1, 2))
    indices, log_probabilities, rest = kept(teacher.double(), 4)
    indices[0, 2] = index
    got = ops.top_distillation_gradient(
        student.to(device), *moved((indices, log_probabilities, rest, torch.ones(2)), device), backend=backend
    )
    assert got.loss.isnan().tolist() == [True, False]
    assert got.gradient.isnan().all(1).tolist() == [True, False]
    assert not got.gradient[1].isnan().any()


@every_backend
def test_all_words_kept_is_the_whole_divergence(backend):
    device = device_of(backend, True)
    student, teacher = (logits_of(3, 130, torch.float32, seed) for seed in (1, 2))
    weight, labels = torch.tensor([1.0, 0.2, 0.3], device=device), torch.tensor([0, 5, 129], device=device)
    targets = moved(kept(teacher.double(), 130), device)
    assert bool(torch.isneginf(targets[2]).all())
    change = Change(0.9, 4.0)
    arguments = options(labels, 0.3, change)
    top = ops.top_distillation_gradient(student.clone().to(device), *targets, weight, **arguments, backend=backend)
    whole = ops.distillation_gradient(student.to(device), teacher.to(device), weight, **arguments, backend=backend)
    assert (top.loss - whole.loss).abs().max() <= 2e-6
    assert (top.gradient - whole.gradient).abs().max() <= 2e-7


@every_backend
def test_a_rest_that_is_nearly_nothing_keeps_its_gradient(backend):
    """The student gives the others 1e-9 of its mass where the teacher has a hundredth: as a difference from 1 that
    mass would be 0, and their gradient not a number."""
    device = device_of(backend, True)
    student = torch.zeros(1, 50)
    student[0, 3] = math.log(49 / 1e-9)
    indices, log_probabilities = torch.tensor([[3]], dtype=torch.int32), torch.tensor([[math.log(0.99)]])
    rest, weight = torch.tensor([math.log(0.01)]), torch.ones(1)
    got = ops.top_distillation_gradient(
        student.to(device), *moved((indices, log_probabilities, rest, weight), device), backend=backend
    )
    assert float(got.loss) == pytest.approx(0.99 * math.log(0.99) + 0.01 * math.log(0.01 / 1e-9), rel=1e-5)
    others = torch.cat([got.gradient[0, :3], got.gradient[0, 4:]])
    assert others.cpu().tolist() == pytest.approx([-0.01 / 49] * 49, rel=1e-5)
    assert float(got.gradient[0, 3]) == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_native_rounds_the_gradient_to_nearest(dtype, top):
    """As torch rounds the gradient that the same logits have in float32; a small weight makes subnormals."""
    need("native", "distillation_gradient")
    student, teacher = (logits_of(64, 999, dtype, seed) for seed in (1, 2))
    weight = 10.0 ** -torch.arange(64).div(8).float()
    targets = kept(teacher.double(), 20)
    made = []
    for logits in (student.float(), student):
        if top:
            made.append(ops.top_distillation_gradient(logits, *targets, weight, backend="native").gradient)
        else:
            made.append(ops.distillation_gradient(logits, teacher, weight, backend="native").gradient)
    assert torch.equal(bits(made[0].to(dtype)), bits(made[1]))
    if dtype == torch.float16:
        assert ((made[1] != 0) & (made[1].abs() < 2**-14)).any()


def test_native_gives_the_same_bits_with_any_threads(threads):
    need("native", "distillation_gradient")
    results = []
    for count in (1, 2, 3):
        threads(count)
        student, teacher = (logits_of(37, 2000, torch.float32, seed) for seed in (1, 2))
        got = ops.distillation_gradient(student, teacher, torch.rand(37, generator=generator(3)), backend="native")
        results.append((got.loss, got.gradient))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_the_reference_takes_few_tokens_at_a_time(monkeypatch):
    seen = []
    original = reference.distillation_gradient_fp64

    def spy(call):
        seen.append(len(call.student))
        return original(call)

    monkeypatch.setattr(reference, "distillation_gradient_fp64", spy)
    monkeypatch.setattr(reference, "LOGIT_BYTES", 3 * 8 * 50)
    student, teacher = (logits_of(7, 50, torch.float32, seed) for seed in (1, 2))
    weight = torch.rand(7, generator=generator(4))
    want = exact(student, teacher, weight)
    assert_near(ops.distillation_gradient(student, teacher, weight, backend="reference"), want, weight, "reference")
    assert seen == [3, 3, 1]


def good(**changed):
    """A call of either op that is right but for what is changed."""
    student, teacher = (logits_of(4, 10, torch.float32, seed) for seed in (1, 2))
    indices, log_probabilities, rest = kept(teacher.double(), 3)
    both = {"student_logits": student, "weight": torch.ones(4), "labels": torch.tensor([1, 2, 3, 4]), "hard": 0.5}
    full = "teacher_logits" in changed or "teacher_cap" in changed
    kind = {"teacher_logits": teacher} if full else {}
    if not full:
        kind = {"indices": indices, "log_probabilities": log_probabilities, "rest": rest}
    function = ops.distillation_gradient if full else ops.top_distillation_gradient
    return function(**{**both, **kind, **changed})


F64 = torch.zeros(4, 10, dtype=torch.float64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student_logits": [1.0]}, "student_logits: expected a torch.Tensor, got list"),
        ({"student_logits": torch.ones(4)}, r"student_logits: expected a matrix \[tokens, words\], got 1 dimensions"),
        ({"student_logits": F64}, "student_logits: expected dtype float32, bfloat16, float16, got float64"),
        ({"student_logits": torch.ones(4, 0)}, r"student_logits: expected at least one word, got \[4, 0\]"),
        ({"student_logits": torch.ones(10, 4).t()}, "student_logits: expected rows of contiguous words, got strides"),
        ({"student_logits": torch.ones(1, 10).expand(4, 10)}, "student_logits: expected rows of contiguous words"),
        ({"teacher_logits": torch.ones(4, 11)}, r"teacher_logits: expected the student's \[4, 10\] on cpu, got"),
        ({"weight": torch.ones(5)}, r"weight: expected float32 \[4\] on cpu, got float32 \[5\] on cpu"),
        ({"weight": torch.ones(4).double()}, r"weight: expected float32 \[4\] on cpu, got float64"),
        ({"hard": 1.5}, "hard: expected a share from 0 to 1, got 1.5"),
        ({"hard": NAN}, "hard: expected a finite number, got nan"),
        ({"labels": None}, r"labels: expected int64 \[4\] for hard=0.5, got None; only 0 does without"),
        ({"labels": torch.ones(4)}, r"labels: expected int64 \[4\] on cpu, got float32 \[4\] on cpu"),
        ({"student_scale": 0}, "student_scale: expected a positive number, got 0"),
        ({"student_cap": 0.0}, "student_cap: expected a positive number, got 0.0"),
        ({"teacher_cap": -2.0}, "teacher_cap: expected a positive number, got -2.0"),
        ({"gradient": 1}, "gradient: expected True, or False without out, got 1"),
        ({"gradient": False, "out": torch.ones(4, 10)}, "gradient: expected True, or False without out, got False"),
        ({"out": torch.ones(4, 9)}, r"out: expected \[4, 10\] on cpu, got \[4, 9\] on cpu"),
        ({"out": torch.ones(4, 10).double()}, "out: expected .* got float64"),
        ({"indices": torch.ones(4, 3).long()}, r"indices: expected int32 \[4, 3\] on cpu, got int64 \[4, 3\]"),
        ({"indices": torch.zeros(4, 0).int()}, "indices: expected from 1 to 10 words a token, got 0"),
        ({"indices": torch.zeros(4, 11).int()}, "indices: expected from 1 to 10 words a token, got 11"),
        ({"indices": torch.zeros(3, 4).int().t()}, "indices: expected a contiguous tensor, got strides"),
        ({"log_probabilities": torch.ones(4, 3).bfloat16()}, r"log_probabilities: expected float32 or float16"),
        ({"rest": torch.ones(3)}, r"rest: expected float32 \[4\] on cpu, got float32 \[3\]"),
    ],
)  # fmt: skip
def test_wrong_arguments(changed, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        good(**changed)


def test_labels_without_a_share_are_not_read():
    got = good(labels=torch.full((4,), -5), hard=0.0)
    assert not got.loss.isnan().any()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def dispatched(device, top, gradient, dtype=torch.float32):
    """Arguments of the op as torch's dispatcher knows it."""
    student, teacher = (logits_of(4, 10, dtype, seed).to(device) for seed in (1, 2))
    weight, loss = torch.rand(4, generator=generator(3)).to(device), torch.zeros(4, device=device)
    labels = torch.tensor([1, 2, 3, 4], device=device)
    into = torch.zeros_like(student) if gradient else None
    if top:
        targets = moved(kept(teacher.cpu().double(), 3), device)
        return (student, *targets, weight, labels, 0.5, 2.0, 3.0, loss, into, None)
    return (student, teacher, weight, labels, 0.5, 2.0, None, 0.5, 3.0, loss, into, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("top", [False, True])
def test_opcheck(top, gradient, device):
    op = torch.ops.hywia.top_distillation_gradient_ if top else torch.ops.hywia.distillation_gradient_
    result = torch.library.opcheck(op.default, dispatched(device, top, gradient))
    assert set(result.values()) == {"SUCCESS"}
    assert len(result) == 4


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_in_one_graph(device):
    torch._dynamo.reset()
    weight, labels = torch.rand(4, generator=generator(3)).to(device), torch.tensor([1, 2, 3, 4], device=device)

    def run(student, teacher, indices, log_probabilities, rest):
        logits = student * 2.0
        made = ops.distillation_gradient(logits, teacher, weight, labels=labels, hard=0.1, student_cap=5.0)
        top = ops.top_distillation_gradient(student * 3.0, indices, log_probabilities, rest, weight, gradient=False)
        return made.loss + 1.0, logits * 2.0, top.loss

    student, teacher = (logits_of(4, 10, torch.float32, seed).to(device) for seed in (1, 2))
    given = (student, teacher, *moved(kept(teacher.cpu().double(), 3), device))
    want = run(*given)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*given)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    torch._dynamo.reset()
