"""The distillation loss of whole models: its gradients, what it computes at a time, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hywia_kernels import HywiaError, UsageError, arch, ops
from hywia_kernels.engine import loss as head_loss
from hywia_kernels.method import fused_head
from hywia_kernels.method.distillation import HeadTargets, TopTargets, distillation_loss, top_targets
from tests.support.comparison import relative
from tests.support.distillation import divergence, top_divergence
from tests.support.models import random_model, sizes

WORDS = 67
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # what the interpreter's numpy masks
BACKENDS = ["native", "triton"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(kind="llama", hidden=24, seed=0, **fields):
    fields = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.3, **fields}
    return random_model(kind, seed, **sizes(WORDS, hidden, 40, 2, 4, 2), head_dim=8, **fields)


FAMILIES = {
    "llama-tied": lambda: tiny(tie_word_embeddings=True),
    "llama-untied": lambda: tiny(tie_word_embeddings=False),
    "gemma2": lambda: tiny("gemma2", final_logit_softcapping=2.0, sliding_window=64, query_pre_attn_scalar=8),
    "granite": lambda: tiny("granite", logits_scaling=3.0, tie_word_embeddings=True),
    "cohere": lambda: tiny("cohere", logit_scale=0.125),
    "phi": lambda: random_model("phi", 0, **sizes(WORDS, 32, 40, 2, 4, 4), pad_token_id=2),  # its head has a bias
}


@pytest.fixture(autouse=True)
def _cohere_in_the_table(monkeypatch):
    """Cohere is no family of the table; for the loss its head alone matters."""
    entry = replace(next(e for e in arch.TABLE if "llama" in e.model_types), model_types=("cohere",))
    monkeypatch.setattr(arch.discovery, "TABLE", (*arch.TABLE, replace(entry, logits=("logit_scale",))))


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]()


@pytest.fixture
def student():
    return FAMILIES["llama-untied"]()


@pytest.fixture
def teacher():
    return tiny(hidden=40, seed=5, tie_word_embeddings=False)


def states(model, n=11, seed=1, dtype=torch.float32):
    """Random hidden states of a model's width."""
    width = model.get_output_embeddings().weight.shape[1]
    return torch.randn(n, width, generator=generator(seed)).to(dtype)


def weights(n=11):
    weight = torch.rand(n, generator=generator(2))
    weight[1::4] = 0.0
    return weight / weight.sum()


def words(n=11):
    return torch.randint(0, WORDS, (n,), generator=generator(3))


def by_head(model, hidden):
    """Float64 logits of hidden states, with the family's change as its own code has it."""
    head, config = model.get_output_embeddings(), model.config
    logits = functional.linear(hidden, head.weight, head.bias)
    cap = getattr(config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return logits / getattr(config, "logits_scaling", 1.0) * getattr(config, "logit_scale", 1.0)


def whole(model, hidden, targets, weight, labels=None, hard=0.0):
    """The loss as one float64 expression over a float64 copy of the model; `(loss, d hidden, d weight, d bias)`."""
    model = copy.deepcopy(model).double().requires_grad_(False)
    head = model.get_output_embeddings().requires_grad_()
    leaf = hidden.detach().double().requires_grad_()
    with torch.enable_grad():
        log_q = by_head(model, leaf).log_softmax(-1)
        if isinstance(targets, HeadTargets):
            theirs = copy.deepcopy(targets.model).double()
            loss = divergence(log_q, by_head(theirs, targets.hidden.double()).detach().log_softmax(-1))
        else:
            loss = top_divergence(log_q, targets.indices, targets.log_probabilities, targets.rest)
        if hard:
            loss = (1 - hard) * loss + hard * functional.nll_loss(log_q, labels, reduction="none")
        total = (loss * weight.double()).sum()
        parameters = [p for p in (head.weight, head.bias) if p is not None]
        return total.detach(), *torch.autograd.grad(total, (leaf, *parameters))


def run(model, hidden, targets, weight, **options):
    """`distillation_loss` and its gradients, the parameters' through `.grad`."""
    head = model.get_output_embeddings()
    leaf = hidden.clone().requires_grad_()
    loss = distillation_loss(model, leaf, targets, weight, **options)
    loss.backward()
    return loss.detach(), leaf.grad, *(p.grad for p in (head.weight, head.bias) if p is not None)


def assert_same(got, want, tolerance=1e-5):
    assert len(got) == len(want)
    assert got[0].dtype == torch.float32
    assert float(got[0]) == pytest.approx(float(want[0]), rel=tolerance, abs=tolerance)
    for gradient, exact in zip(got[1:], want[1:], strict=True):
        assert relative(gradient, exact) <= tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hard", [0.0, 0.3])
def test_gradients_of_every_kind_of_head(family, teacher, hard, backend):
    hidden, targets = states(family), HeadTargets(teacher, states(teacher, seed=4))
    want = whole(family, hidden, targets, weights(), words(), hard)
    got = run(family, hidden, targets, weights(), labels=words() if hard else None, hard=hard, backend=backend)
    assert_same(got, want)
    assert not bool(got[1][1::4].any()), "what has no weight has no gradient"


def test_a_teacher_of_the_same_family(family):
    dense = copy.deepcopy(family)
    with torch.no_grad():
        family.get_output_embeddings().weight.mul_(0.9)
    hidden, targets = states(family), HeadTargets(dense, states(dense, seed=4))
    assert_same(run(family, hidden, targets, weights()), whole(family, hidden, targets, weights()))


def test_a_whole_step_of_training(family):
    """Through the decoder, with the model's own logits on the other side: a tied embedding gets both its gradients."""
    dense = copy.deepcopy(family)
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(7)))
    family.tie_weights()
    tokens = torch.randint(3, WORDS, (2, 9), generator=generator(8))
    exact, sure = (copy.deepcopy(model).double() for model in (family, dense))
    with torch.no_grad():
        target = sure(tokens).logits.flatten(0, 1).log_softmax(-1)
        hidden = dense.get_decoder()(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    divergences = divergence(exact(tokens).logits.flatten(0, 1).log_softmax(-1), target)
    divergences.mean().backward()
    masked = family.get_decoder()(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    loss = distillation_loss(family, masked, HeadTargets(dense, hidden), torch.full((18,), 1 / 18))
    loss.backward()
    mean = float(divergences.detach().mean())
    assert float(loss.detach()) == pytest.approx(mean, rel=1e-4)
    assert mean > 1e-3
    parameters = dict(exact.named_parameters())
    for name, parameter in family.named_parameters():
        want = parameters[name].grad
        # A bias of keys has none: a softmax does not see what all keys have in common.
        assert float((parameter.grad - want).norm()) <= 1e-3 * float(want.norm()) + 1e-7, name


@pytest.mark.parametrize("k", [1, 5, WORDS])
@pytest.mark.parametrize("hard", [0.0, 0.3])
def test_kept_targets(student, teacher, k, hard):
    hidden, theirs = states(student), states(teacher, seed=4)
    targets = top_targets(teacher, theirs, k)
    want = whole(student, hidden, targets, weights(), words(), hard)
    assert_same(run(student, hidden, targets, weights(), labels=words(), hard=hard), want)
    if k == WORDS:
        student.zero_grad()
        full = whole(student, hidden, HeadTargets(teacher, theirs), weights(), words(), hard)
        assert_same(run(student, hidden, targets, weights(), labels=words(), hard=hard), full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_top_targets_are_the_teacher_s(family, dtype, monkeypatch):
    monkeypatch.setitem(fused_head.CHUNK_BYTES, "cpu", 4 * 16 * WORDS)
    hidden = states(family, dtype=dtype)
    family.to(dtype)
    targets = top_targets(family, hidden, 6)
    assert (targets.indices.dtype, targets.rest.dtype) == (torch.int32, torch.float32)
    assert targets.log_probabilities.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
    log_p = head_loss.logits_of(family, hidden).double().log_softmax(1)
    values = log_p.topk(6, 1).values
    assert (targets.log_probabilities - values).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-10 * 8)
    assert torch.equal(log_p.gather(1, targets.indices.long()), values), "of equal words either is right"
    rest = log_p.scatter(1, targets.indices.long(), float("-inf")).logsumexp(1)
    assert (targets.rest - rest).abs().max() <= 1e-5
    everything = top_targets(family, hidden, WORDS)
    assert bool(torch.isneginf(everything.rest).all())


def eager(model, hidden, targets, weight):
    """As a user would write it in the model's dtype: its logits in float32, and autograd."""
    head = model.get_output_embeddings()
    leaf = hidden.clone().requires_grad_()
    with torch.no_grad():
        target = head_loss.logits_of(targets.model, targets.hidden).log_softmax(-1)
    log_q = head_loss.logits_of(model, leaf).log_softmax(-1)
    loss = (functional.kl_div(log_q, target, log_target=True, reduction="none").sum(-1) * weight).sum()
    return loss.detach(), *torch.autograd.grad(loss, (leaf, head.weight))


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-2), (torch.float16, 2.5e-3)], ids=str)
def test_narrow_heads_are_as_near_as_eager_ones(student, teacher, dtype, most):
    """Logits and their gradient have the head's dtype, so both are off by its rounding; no more is lost."""
    student.to(dtype), teacher.to(dtype)
    hidden, targets = states(student, 64, dtype=dtype), HeadTargets(teacher, states(teacher, 64, 4, dtype))
    weight = weights(64)
    want = whole(student, hidden, targets, weight)
    got, plain = run(student, hidden, targets, weight), eager(student, hidden, targets, weight)
    for gradient, other, exact in zip(got[1:], plain[1:], want[1:], strict=True):
        assert gradient.dtype == dtype
        assert relative(gradient, exact) <= min(most, 1.2 * relative(other, exact))
    assert float(got[0]) == pytest.approx(float(want[0]), rel=most)


@pytest.mark.parametrize("hard", [0.0, 0.3])
@pytest.mark.parametrize("top", [False, True])
def test_wide_logits_of_narrow_heads(student, teacher, top, hard, monkeypatch):
    """Where a device gives products of 16 bits in float32, logits are not rounded, and their gradient is once."""

    def add_wide(total, one, other, *, before=1.0):
        assert (total.dtype, one.dtype, other.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
        total.copy_((before * total if before else 0.0) + one.float() @ other.float())

    student.bfloat16(), teacher.bfloat16()
    hidden, theirs = (states(model, 64, seed, torch.bfloat16) for model, seed in ((student, 1), (teacher, 4)))
    targets = top_targets(teacher, theirs, 6) if top else HeadTargets(teacher, theirs)
    want = whole(student, hidden, targets, weights(64), words(64), hard)
    options = {"labels": words(64), "hard": hard}
    narrow = run(student, hidden, targets, weights(64), **options)
    student.zero_grad()
    monkeypatch.setattr(fused_head, "_adds_wide", lambda device: True)
    monkeypatch.setattr(fused_head, "_add_wide", add_wide)
    monkeypatch.setitem(fused_head.CHUNK_BYTES, "cpu", 20 * (4 * (1 if top else 2) + 2) * WORDS)
    wide = run(student, hidden, targets, weights(64), **options)
    assert float(wide[0]) == pytest.approx(float(want[0]), rel=2e-4)
    for gradient, rounded, exact in zip(wide[1:], narrow[1:], want[1:], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert relative(gradient, exact) < 4e-3
        assert relative(gradient, exact) < relative(rounded, exact)


def test_float16_keeps_what_a_loss_scale_brings_back(student, teacher):
    """Of 30,000 tokens each has a gradient that float16 holds to a digit at most, until the scale arrives."""
    student.half(), teacher.half()
    hidden, targets = states(student, dtype=torch.float16), HeadTargets(teacher, states(teacher, 11, 4, torch.float16))
    weight = torch.full((11,), 1 / 30_000)
    want = whole(student, hidden, targets, weight)
    leaf = hidden.clone().requires_grad_()
    (distillation_loss(student, leaf, targets, weight) * 4096).backward()
    assert relative(leaf.grad, 4096 * want[1]) <= 3e-3
    assert relative(student.get_output_embeddings().weight.grad, 4096 * want[2]) <= 3e-3


def test_autocast(student, teacher):
    hidden, targets = states(student, 64), HeadTargets(teacher, states(teacher, 64, 4))
    want = whole(student, hidden, targets, weights(64))
    with torch.autocast("cpu", torch.bfloat16):
        got = run(student, hidden, targets, weights(64))
    assert [x.dtype for x in got] == [torch.float32] * 3
    for gradient, exact in zip(got[1:], want[1:], strict=True):
        assert 5e-4 < relative(gradient, exact) < 2e-2, "products in bfloat16, and no worse"


class Largest(TorchDispatchMode):
    """Bytes of the largest result of any operator, and all results' shapes."""

    def __init__(self):
        super().__init__()
        self.bytes, self.shapes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return made


@pytest.mark.parametrize("top", [False, True])
def test_no_more_than_a_chunk_of_logits_exists(student, teacher, top, monkeypatch):
    n, row = 500, 4 * WORDS
    monkeypatch.setitem(fused_head.CHUNK_BYTES, "cpu", 30 * row)
    hidden, theirs = states(student, n).requires_grad_(), states(teacher, n, 4)
    with Largest() as seen:
        targets = top_targets(teacher, theirs, 3) if top else HeadTargets(teacher, theirs)
        distillation_loss(student, hidden, targets, weights(n)).backward()
    chunk = 30 if top else 15  # with a teacher at hand, the models share the bytes
    logits = {shape for shape in seen.shapes if len(shape) == 2 and shape[1] == WORDS}
    assert max(rows for rows, _ in logits if rows not in (24, 40)) == chunk  # these are the transposed heads
    assert seen.bytes == n * (24 if top else 40) * 4, "nothing larger than the hidden states, here too"
    assert n * row > 1.5 * seen.bytes


def test_the_default_chunk_is_what_is_documented():
    parts = fused_head.chunks(16_384, (4 + 4 + 2) * 128_256, torch.device("cuda"))
    assert [part.stop - part.start for part in parts] == [768] * 21 + [256]
    assert 768 * (4 + 4 + 2) * 128_256 == 985_006_080 < fused_head.CHUNK_BYTES["cuda"]


@pytest.mark.parametrize(("tokens", "row"), [(0, 8), (1, 8), (1, 10**10), (7, 10**9 // 3), (1000, 10**6), (999, 10**7)])
def test_chunks_cover_all_tokens_once(tokens, row):
    parts = fused_head.chunks(tokens, row, torch.device("cuda"))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(tokens))
    assert all(part.start < part.stop for part in parts)
    assert all((part.stop - part.start) * row <= 10**9 or part.stop - part.start == 1 for part in parts)


@pytest.mark.parametrize("tokens_at_once", [1, 3, 100])
@pytest.mark.parametrize("top", [False, True])
def test_chunks_do_not_change_the_result(student, teacher, tokens_at_once, top, monkeypatch):
    hidden, theirs = states(student), states(teacher, seed=4)
    targets = top_targets(teacher, theirs, 4) if top else HeadTargets(teacher, theirs)
    want = whole(student, hidden, targets, weights(), words(), 0.5)
    seen = []
    name = "top_distillation_gradient" if top else "distillation_gradient"
    original = getattr(ops, name)

    def spy(logits, *arguments, **options):
        seen.append(len(logits))
        return original(logits, *arguments, **options)

    monkeypatch.setattr(ops, name, spy)
    monkeypatch.setitem(fused_head.CHUNK_BYTES, "cpu", tokens_at_once * 4 * WORDS * (1 if top else 2))
    assert_same(run(student, hidden, targets, weights(), labels=words(), hard=0.5), want)
    assert sum(seen) == int((weights() > 0).sum()) == 8, "padding is not computed"
    assert max(seen) == min(tokens_at_once, 8)


@pytest.mark.parametrize("weight", [torch.zeros(0), torch.zeros(3), torch.tensor([2.0])], ids=["none", "zeros", "one"])
def test_few_tokens(student, teacher, weight):
    n = len(weight)
    hidden, targets = states(student, n), HeadTargets(teacher, states(teacher, n, 4))
    got = run(student, hidden, targets, weight)
    want = whole(student, hidden, targets, weight)
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-5)
    for gradient, exact in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(gradient, exact.float(), rtol=1e-4, atol=1e-6)
    assert (float(got[0]) > 0) == (n == 1)


def test_labels_of_padding_are_not_read(student, teacher):
    labels = words()
    labels[1::4] = -100
    targets = HeadTargets(teacher, states(teacher, seed=4))
    arguments = {"labels": labels, "hard": 0.4}
    loss = distillation_loss(student, states(student), targets, weights(), **arguments)
    assert float(loss.detach()) == pytest.approx(
        float(whole(student, states(student), targets, weights(), words(), 0.4)[0]), rel=1e-5
    )
    labels[0] = WORDS
    assert bool(distillation_loss(student, states(student), targets, weights(), **arguments).isnan())


def test_a_frozen_head_costs_no_product(student, teacher):
    student.get_output_embeddings().requires_grad_(False)
    targets, leaf = HeadTargets(teacher, states(teacher, seed=4)), states(student).requires_grad_()
    with Largest() as seen:
        distillation_loss(student, leaf, targets, weights()).backward()
    assert student.get_output_embeddings().weight.grad is None
    assert relative(leaf.grad, whole(student, states(student), targets, weights())[1]) <= 1e-5
    assert (WORDS, 24) in seen.shapes, "the head's own detached"
    with Largest() as both:
        head = student.get_output_embeddings().requires_grad_()
        distillation_loss(student, states(student), targets, weights()).backward()
    assert relative(head.weight.grad, whole(student, states(student), targets, weights())[2]) <= 1e-5
    assert (11, 24) in both.shapes


def test_no_gradients_without_grad(student, teacher, monkeypatch):
    hidden, targets = states(student), HeadTargets(teacher, states(teacher, seed=4))
    asked = []
    original = ops.distillation_gradient

    def spy(*arguments, **options):
        asked.append(options["gradient"])
        return original(*arguments, **options)

    monkeypatch.setattr(ops, "distillation_gradient", spy)
    want = float(whole(student, hidden, targets, weights())[0])
    with torch.no_grad():
        loss = distillation_loss(student, hidden.requires_grad_(), targets, weights())
    assert not loss.requires_grad
    student.requires_grad_(False)
    with torch.inference_mode():
        again = distillation_loss(student, states(student), targets, weights())
    plain = distillation_loss(student, states(student), targets, weights())
    assert not plain.requires_grad
    assert asked == [False] * 3
    assert [float(x) for x in (loss, again, plain)] == pytest.approx([want] * 3, rel=1e-5)


def test_backward_scales_and_runs_once(student, teacher):
    hidden, targets = states(student), HeadTargets(teacher, states(teacher, seed=4))
    want = whole(student, hidden, targets, weights())
    leaf = hidden.clone().requires_grad_()
    loss = distillation_loss(student, leaf, targets, weights())
    (loss * -3.0).backward(retain_graph=True)
    assert relative(leaf.grad, -3.0 * want[1]) <= 1e-5
    with pytest.raises(HywiaError, match="loss: expected one backward pass, got a second"):
        loss.backward()
    (2.0 * distillation_loss(student, leaf, targets, weights())).backward()
    assert relative(leaf.grad, -want[1]) <= 1e-5, "gradients add up"
    assert relative(student.get_output_embeddings().weight.grad, -want[2]) <= 1e-5


class Doubling(nn.Linear):
    def forward(self, states):
        return 2.0 * super().forward(states)


def test_heads_that_are_not_plain(student, teacher):
    targets = HeadTargets(teacher, states(teacher))
    student.lm_head = Doubling(24, WORDS)
    with pytest.raises(HywiaError, match=r"expected a head that is a torch\.nn\.Linear, got Doubling; leave"):
        distillation_loss(student, states(student), targets, weights())
    plain = tiny(tie_word_embeddings=False)
    plain.config.final_logit_softcapping = 30.0
    with pytest.raises(HywiaError, match=r"config sets final_logit_softcapping=30\.0"):
        distillation_loss(plain, states(plain), targets, weights())
    with pytest.raises(HywiaError, match=r"config sets final_logit_softcapping=30\.0"):
        distillation_loss(teacher, states(teacher), HeadTargets(plain, states(plain)), weights())


def test_two_changes_of_the_logits_are_refused(monkeypatch):
    model = FAMILIES["granite"]()
    entry = replace(arch.architecture(model), logits=("logits_scaling", "logit_scale"))
    monkeypatch.setattr(arch.discovery, "TABLE", (entry,))
    assert head_loss.logit_change(model) == (1 / 3, None)
    model.config.logit_scale = 2.0
    with pytest.raises(HywiaError, match="expected one change of the logits after the head, got logits_scaling and"):
        head_loss.logit_change(model)


def refused(student, teacher, **changed):
    given = {"hidden": states(student), "targets": HeadTargets(teacher, states(teacher)), "weight": weights()}
    return distillation_loss(student, **{**given, **changed})


def kept(n=11, k=3):
    return TopTargets(torch.zeros(n, k).int(), torch.zeros(n, k), torch.zeros(n))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda s, t: {"hidden": states(s)[None]}, r"hidden: expected final .* \[n, 24\], got \[1, 11, 24\]"),
        (lambda s, t: {"hidden": states(t)}, r"hidden: expected final hidden states \[n, 24\], got \[11, 40\]"),
        (lambda s, t: {"hidden": states(s).int()}, "hidden: expected a floating-point dtype, got torch.int32"),
        (lambda s, t: {"targets": None}, "targets: expected HeadTargets or TopTargets, got NoneType"),
        (lambda s, t: {"targets": HeadTargets(t, states(s))}, r"targets.hidden: expected .* states \[n, 40\]"),
        (lambda s, t: {"targets": HeadTargets(t, states(t, 12))}, r"targets.hidden: expected 11 rows, .*\[12, 40\]"),
        (lambda s, t: {"targets": kept(9)}, r"targets.indices: expected 11 rows, one for each .*got \[9, 3\]"),
        (lambda s, t: {"weight": torch.ones(11).double()}, r"weight: expected float32 \[11\], got torch.float64"),
        (lambda s, t: {"weight": 1.0}, "weight: expected 11 rows, one for each .*got float"),
        (lambda s, t: {"hard": 2.0}, "hard: expected a share from 0 to 1, got 2.0"),
        (lambda s, t: {"hard": 0.5}, r"labels: expected int64 \[11\] for hard=0.5, got None"),
        (lambda s, t: {"hard": 0.5, "labels": words().int()}, r"labels: expected int64 .* got torch.int32 \[11\]"),
        (lambda s, t: {"labels": words(10)}, r"labels: expected 11 rows, one for each .*got \[10\]"),
    ],
)  # fmt: skip
def test_wrong_arguments(student, teacher, changed, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        refused(student, teacher, **changed(student, teacher))


def test_vocabularies_that_differ(student):
    other = random_model("llama", 0, **sizes(WORDS + 1, 24, 40, 1, 4, 2))
    with pytest.raises(
        UsageError, match=f"expected a teacher with the student's {WORDS} words, got one with {WORDS + 1};"
    ):
        refused(student, other)


@pytest.mark.parametrize("k", [0, WORDS + 1, 2.0, True])
def test_wrong_numbers_of_kept_words(teacher, k):
    with pytest.raises(UsageError, match=f"^k: expected from 1 to the head's {WORDS} words, got {k!r}"):
        top_targets(teacher, states(teacher), k)
