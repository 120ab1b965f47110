"""The distillation loss on a GPU: the Triton kernels at real vocabularies, and the memory of a whole loss."""

from __future__ import annotations

import pytest
import torch

from hywia_kernels import ops
from hywia_kernels.method import fused_head
from hywia_kernels.method.distillation import HeadTargets, distillation_loss, top_targets
from tests.support.comparison import relative
from tests.support.distillation import Change, assert_near, exact, kept, logits_of
from tests.support.models import random_model, sizes
from tests.support.operands import bits, need

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
DEVICE = "cuda"
WORDS = (49_152, 50_257, 128_256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _give_memory_back():
    yield
    torch.cuda.empty_cache()


def logits(tokens, words, dtype, seed):
    return logits_of(tokens, words, dtype, seed).to(DEVICE)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_at_real_vocabularies(dtype, words, cap):
    need("triton", "distillation_gradient")
    tokens, change = 200, Change(0.7, cap)
    student, teacher = logits(tokens, words, dtype, 1), logits(tokens, words, torch.bfloat16, 2)
    weight = torch.rand(tokens, device=DEVICE)
    weight[::7] = 0.0
    labels = torch.randint(0, words, (tokens,), device=DEVICE)
    shared = {"labels": labels, "hard": 0.2, "student_scale": 0.7, "student_cap": cap, "backend": "triton"}
    for top in (None, 64, 1500):
        targets = teacher if top is None else kept(teacher.double(), top)
        want = exact(student, targets, weight, labels, 0.2, change)
        want = want[0].masked_fill(weight == 0, 0.0), want[1]
        results = []
        for _ in range(2):
            over = student.clone()
            if top is None:
                got = ops.distillation_gradient(over, teacher, weight, **shared)
            else:
                got = ops.top_distillation_gradient(over, *targets, weight, **shared)
            assert got.gradient is over
            results.append(got)
        assert_near(results[0], want, weight, "triton")
        assert torch.equal(bits(results[0].gradient), bits(results[1].gradient))
        assert torch.equal(results[0].loss, results[1].loss)
        before, out = student.clone(), torch.full_like(student, float("nan"))
        if top is None:
            again = ops.distillation_gradient(student, teacher, weight, out=out, **shared)
        else:
            again = ops.top_distillation_gradient(student, *targets, weight, out=out, **shared)
        assert torch.equal(bits(again.gradient), bits(results[0].gradient))
        assert torch.equal(bits(student), bits(before)), "the logits are as they were"


def head_of(words, features, dtype, seed=0, **fields):
    """A model of one thin layer: its head is what counts."""
    with torch.device(DEVICE):
        model = random_model("llama", seed, **sizes(words, features, 16, 1, features // 64, features // 64), **fields)
    return model.to(DEVICE, dtype)


def states(tokens, features, dtype, seed):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn((tokens, features), generator=generator, device=DEVICE).to(dtype)


def test_a_loss_takes_a_chunk_beside_weights_and_gradients():
    """16,384 tokens of 128,256 words in bfloat16: at most 1.1 GB, where the logits of one model are 4.2 GB."""
    tokens, words, features = 16_384, 128_256, 4096
    student, teacher = (head_of(words, features, torch.bfloat16, seed, tie_word_embeddings=True) for seed in (0, 1))
    hidden, theirs = (states(tokens, features, torch.bfloat16, seed) for seed in (2, 3))
    hidden.requires_grad_()
    weight = torch.full((tokens,), 1 / tokens, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = distillation_loss(student, hidden, HeadTargets(teacher, theirs), weight)
    loss.backward()
    torch.cuda.synchronize()
    gradients = hidden.numel() * 2 + words * features * 4
    assert torch.cuda.max_memory_allocated() - before - gradients <= 1.1e9
    assert float(loss.detach()) > 0
    assert hidden.grad.isfinite().all()
    assert student.get_output_embeddings().weight.grad.isfinite().all()


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)], ids=str
)
def test_gradients_of_a_whole_loss(dtype, most, top, monkeypatch):
    """Against float64, in several chunks, with padding."""
    monkeypatch.setitem(fused_head.CHUNK_BYTES, "cuda", 300 * 2 * 49_152 * dtype.itemsize)
    tokens, words, features = 1000, 49_152, 576
    student, teacher = (head_of(words, features, dtype, seed) for seed in (0, 1))
    with torch.no_grad():
        for model in (student, teacher):
            model.lm_head.weight.normal_(0.0, 0.1)
    hidden, theirs = states(tokens, features, dtype, 2).requires_grad_(), states(tokens, features, dtype, 3)
    weight = torch.rand(tokens, device=DEVICE)
    weight[::5] = 0.0
    weight /= weight.sum()
    targets = top_targets(teacher, theirs, 100) if top else HeadTargets(teacher, theirs)
    loss = distillation_loss(student, hidden, targets, weight)
    (loss * 512).backward()
    x, w = hidden.detach().double(), student.lm_head.weight.detach().double()
    z = x @ w.t()
    given = (
        (theirs.double() @ teacher.lm_head.weight.detach().double().t())
        if not top
        else (targets.indices, targets.log_probabilities, targets.rest)
    )
    losses, gradient = exact(z, given, weight)
    assert float(loss.detach()) == pytest.approx(float((losses * weight).sum()), rel=most)
    assert relative(hidden.grad / 512, gradient @ w) <= most
    assert relative(student.lm_head.weight.grad / 512, gradient.t() @ x) <= most


def test_a_teacher_on_another_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    student, teacher = (head_of(5000, 128, torch.float32, seed) for seed in (0, 1))
    hidden, theirs = (states(300, 128, torch.float32, seed) for seed in (2, 3))
    weight = torch.full((300,), 1 / 300, device=DEVICE)
    with torch.no_grad():
        here = distillation_loss(student, hidden, HeadTargets(teacher, theirs), weight)
        there = distillation_loss(student, hidden, HeadTargets(teacher.to("cuda:1"), theirs.to("cuda:1")), weight)
    assert float(there) == pytest.approx(float(here), rel=1e-6)
