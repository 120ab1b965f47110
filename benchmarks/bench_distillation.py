"""The distillation loss of a language model's head, forward and backward, against eager torch and Liger-Kernel's fused
losses: `python -m benchmarks.bench_distillation --help`.

All compute the mean of KL(teacher ‖ student) over the tokens from both models' final hidden states and heads, and the
gradients at the student's. `eager` makes the logits of all tokens in float32 and lets autograd do the rest.
Liger-Kernel 0.8.5 has three ways to the same number; they run where it is installed:

* `liger jsd`, `LigerFusedLinearJSD(jsd_beta=0)`: its generalised JSD is the forward KL at beta 0 (`if beta == 0.0:`,
  with `loss = Y_prob * (Y - X)`, in `_jsd_kernel` of liger_kernel/ops/jsd.py); the weight's gradient adds up in the
  head's dtype unless `accum_dtype` says float32, as here.
* `liger chunked`, `LigerFusedLinearJSDLoss(beta=0, weight_hard_loss=0, weight_soft_loss=1)` of
  liger_kernel/chunked_loss/jsd_loss.py: chunks of 1,024 tokens through torch.func, compiled unless `--no-compile`.
* `liger kl`, `LigerFusedLinearKLDivLoss(reduction="batchmean")`: against the teacher's probabilities `[tokens, words]`,
  all of them, which are made in the head's dtype before, within the time.

`peak` is what the device's allocator (on a CPU, the process) held at most beyond the operands, gradients included.
Errors are norms relative to the same gradient in float64, and nothing is timed before they have passed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hywia_kernels.method.distillation import HeadTargets, distillation_loss

from . import memory
from .cases import SHORT
from .session import Session, argv_of, at_least, common_arguments, make_parser, parse
from .timing import Timer

OURS, EAGER = "hywia", "eager"
# Allowed error of a gradient. Logits of 10 that are rounded to bfloat16 are off by up to 0.03, where the models' differ
# by some tenths: that is what is left of the gradient's digits, in all ways but Liger's JSD, whose logits are float32.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
BLOCK = 256  # tokens of the float64 reference at a time
COLUMNS = {
    **dict.fromkeys(("case", "implementation", "dtype", "liger"), str),
    **dict.fromkeys(("tokens", "words", "student_features", "teacher_features"), int),
    **dict.fromkeys(("ms", "ms_p20", "ms_p80"), float),
    "runs": int,
    "ratio_to_hywia": float,  # of the times: above 1 is slower
    "peak_bytes": int,
    "gradient_bytes": int,
    **dict.fromkeys(("loss_error", "hidden_error", "weight_error"), float),
}

Result = tuple[Tensor, Tensor, Tensor]  # loss, gradient at the hidden states, gradient at the weight


@dataclass(frozen=True)
class Case:
    tokens: int
    words: int
    student: int  # features
    teacher: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        widths = f"{self.student}" if self.student == self.teacher else f"{self.student}/{self.teacher}"
        return f"{self.tokens}x{self.words} h {widths} {SHORT[self.dtype]}"

    @property
    def gradient_bytes(self) -> int:
        return (self.tokens + self.words) * self.student * self.dtype.itemsize


CASES = {
    "cuda": (
        Case(16_384, 49_152, 576, 576),
        Case(16_384, 49_152, 576, 576, torch.float32),
        Case(16_384, 128_256, 2048, 4096),
        Case(16_384, 128_256, 4096, 4096),
    ),
    "cpu": (Case(1024, 49_152, 576, 576, torch.float32), Case(1024, 49_152, 576, 576)),
}


class Headed(nn.Module):
    """A model of which the loss sees the head alone."""

    def __init__(self, weight: Tensor):
        from transformers import LlamaConfig

        super().__init__()
        self.config = LlamaConfig(
            vocab_size=weight.shape[0], hidden_size=weight.shape[1], num_attention_heads=1, num_key_value_heads=1
        )
        self.lm_head = nn.Linear(1, 1, bias=False, device=weight.device, dtype=weight.dtype)
        self.lm_head.weight = nn.Parameter(weight)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


@dataclass(frozen=True)
class Operands:
    hidden: Tensor  # of the student, requires grad
    weight: Tensor  # requires grad
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device) -> Operands:
        """Logits of a spread of 3, and a student whose divergence is some tenths of a nat."""

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            return (scale * torch.randn((rows, columns), device=device)).to(case.dtype)

        theirs = normal(case.tokens, case.teacher, 1.0), normal(case.words, case.teacher, 3.0 / case.teacher**0.5)
        if case.student == case.teacher:
            mine = theirs[0] + normal(case.tokens, case.teacher, 0.2), theirs[1].clone()
        else:
            mine = normal(case.tokens, case.student, 1.0), normal(case.words, case.student, 3.0 / case.student**0.5)
        return cls(mine[0].requires_grad_(), mine[1].requires_grad_(), *theirs)

    def backward(self, loss: Tensor) -> Result:
        hidden, weight = torch.autograd.grad(loss, (self.hidden, self.weight))
        return loss.detach(), hidden, weight


def reference(given: Operands) -> Result:
    """In float64, a few tokens at a time."""
    weight, theirs = given.weight.detach().double(), given.teacher_weight.double()
    loss, of_weight, of_hidden = 0.0, torch.zeros_like(weight), []
    for at in range(0, len(given.hidden), BLOCK):
        x = given.hidden.detach()[at : at + BLOCK].double()
        log_q = (x @ weight.t()).log_softmax(1)
        log_p = (given.teacher_hidden[at : at + BLOCK].double() @ theirs.t()).log_softmax(1)
        p = log_p.exp()
        loss = loss + (p * (log_p - log_q)).sum()
        gradient = (log_q.exp() - p) / len(given.hidden)
        of_hidden.append(gradient @ weight)
        of_weight.addmm_(gradient.t(), x)
    return torch.as_tensor(loss) / len(given.hidden), torch.cat(of_hidden), of_weight


def eager(given: Operands) -> Result:
    with torch.no_grad():
        target = functional.linear(given.teacher_hidden, given.teacher_weight).float().log_softmax(1)
    log_q = functional.linear(given.hidden, given.weight).float().log_softmax(1)
    return given.backward(functional.kl_div(log_q, target, log_target=True, reduction="batchmean"))


def ours(case: Case, given: Operands, backend: str | None) -> Callable[[], Result]:
    student, teacher = Headed(given.weight.detach()), Headed(given.teacher_weight)
    head = student.lm_head.weight
    targets = HeadTargets(teacher, given.teacher_hidden)
    share = torch.full((case.tokens,), 1.0 / case.tokens, device=given.hidden.device)

    def call() -> Result:
        loss = distillation_loss(student, given.hidden, targets, share, backend=backend)
        hidden, weight = torch.autograd.grad(loss, (given.hidden, head))
        return loss.detach(), hidden, weight

    return call


def liger(case: Case, given: Operands, compiled: bool) -> dict[str, Callable[[], Result]]:
    """Liger-Kernel's ways, by name; none where it is not installed. Its kernels run on a GPU alone."""
    if importlib.util.find_spec("liger_kernel") is None:
        print("  skipped: Liger-Kernel is not installed (pip install liger-kernel==0.8.5)")
        return {}
    chunked_loss: Any = importlib.import_module("liger_kernel.chunked_loss")
    labels = torch.zeros(case.tokens, dtype=torch.int64, device=given.hidden.device)
    chunked = chunked_loss.LigerFusedLinearJSDLoss(
        beta=0.0, weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=compiled
    )
    four = given.hidden, given.weight, given.teacher_hidden, given.teacher_weight
    ways = {"liger chunked": lambda: given.backward(chunked(*four, labels))}
    if given.hidden.device.type != "cuda":
        print("  skipped: Liger-Kernel's Triton losses need a GPU")
        return ways
    fused: Any = importlib.import_module("liger_kernel.transformers.fused_linear_jsd")
    jsd = fused.LigerFusedLinearJSD(jsd_beta=0.0, accum_dtype=torch.float32)
    fused = importlib.import_module("liger_kernel.transformers.fused_linear_kl_div")
    kl = fused.LigerFusedLinearKLDivLoss(reduction="batchmean", accum_dtype=torch.float32)

    def against_probabilities() -> Result:
        with torch.no_grad():
            logits = functional.linear(given.teacher_hidden, given.teacher_weight)
            target = torch.softmax(logits, 1, out=logits)
        return given.backward(kl(given.hidden, given.weight, target))

    return ways | {
        "liger jsd": lambda: given.backward(jsd(*four, None)),
        "liger kl": against_probabilities,
    }


def errors(got: Result, want: Result) -> tuple[float, float, float]:
    """Of the loss, relative, and of both gradients, in norms; NaN where anything is."""
    loss = abs(float(got[0]) / float(want[0]) - 1.0)
    hidden, weight = (float((a.double() - b).norm() / b.norm()) for a, b in zip(got[1:], want[1:], strict=True))
    return loss, hidden, weight


def measure(case: Case, arguments: argparse.Namespace, session: Session, timer: Timer) -> None:
    """Add a row for every way whose gradients are right."""
    device = timer.device
    given = Operands.random(case, device)
    want = reference(given)
    ways = {OURS: ours(case, given, arguments.backend), EAGER: lambda: eager(given)}
    ways |= liger(case, given, not arguments.no_compile)
    version = importlib.metadata.version("liger_kernel") if importlib.util.find_spec("liger_kernel") else ""
    baseline = None
    for name, way in ways.items():
        if arguments.only and name not in arguments.only:
            continue
        try:
            memory.free(device)
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else memory.resident()
            peak = memory.Peak(device, 0 if device.type == "cuda" else before)
            got = way()
            timer.synchronize()
            held = peak.bytes()
            off = errors(got, want)
            del got
            if not max(off) <= TOLERANCE[case.dtype]:  # NaN fails too
                session.fail(f"{case.name}, {name}: WRONG, errors {off}, allowed {TOLERANCE[case.dtype]:.0e}")
                continue
            reading = timer.call(way, cold=False)
        except torch.cuda.OutOfMemoryError:
            print(f"  {case.name}, {name}: does not fit")
            continue
        except Exception as problem:  # one broken way must not cost the run its other figures
            session.fail(f"{case.name}, {name}: {type(problem).__name__}: {problem}")
            continue
        baseline = reading.median if name == OURS else baseline
        row = session.add(
            case=case.name,
            implementation=name,
            dtype=SHORT[case.dtype],
            liger=version,
            tokens=case.tokens,
            words=case.words,
            student_features=case.student,
            teacher_features=case.teacher,
            **{column: us / 1e3 for column, us in reading.columns("ms").items()},
            runs=reading.runs,
            ratio_to_hywia=reading.median / baseline if baseline else None,
            peak_bytes=None if held is None else held - (before if device.type == "cuda" else 0),
            gradient_bytes=case.gradient_bytes,
            **dict(zip(("loss_error", "hidden_error", "weight_error"), off, strict=True)),
        )
        ratio = f"{row.ratio_to_hywia:.2f}" if row.ratio_to_hywia else ""
        held_gb = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
        print(
            f"{case.name:<34} {name:<14} {row.ms:>10.1f} {ratio:>6} {held_gb:>8} {case.gradient_bytes / 1e9:>8.2f} "
            f"{off[0]:>9.0e} {off[1]:>9.0e} {off[2]:>9.0e}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> int:
    argv = argv_of(argv)
    parser = make_parser("benchmarks.bench_distillation", __doc__)
    common_arguments(parser, runs=10)
    parser.add_argument("--tokens", type=at_least(1), help="instead of each case's own number")
    parser.add_argument("--cases", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these ways alone, e.g. hywia eager 'liger jsd'")
    parser.add_argument("--backend", help="of ops.distillation_gradient; default: the automatic choice")
    parser.add_argument("--no-compile", action="store_true", help="'liger chunked' without torch.compile")
    arguments = parse(parser, argv)
    timer = Timer(arguments.device, arguments.runs)
    session = Session(arguments, "benchmarks.bench_distillation", argv, COLUMNS, timer)
    print(f"\n{'case':<34} {'by':<14} {'ms':>10} {'ratio':>6} {'peak GB':>8} {'grads':>8} {'errors':>29}", flush=True)
    for case in CASES[arguments.device.type] if cases is None else cases:
        if arguments.cases in case.name:
            measure(replace(case, tokens=arguments.tokens or case.tokens), arguments, session, timer)
            memory.free(arguments.device)
    return session.finish() or int(not session.rows)


if __name__ == "__main__":
    sys.exit(main())
