"""Scoring of a whole model: `calibrate` against a plain forward and backward and against LLM-Pruner's flow.

    python -m benchmarks.bench_engine                                  # 7B shape on a GPU, SmolLM2 on a CPU
    python -m benchmarks.bench_engine --samples 10 128 --only plain param_mix@10 auto

Every time is the host clock of one whole call, device synchronised, median after a warm-up. `plain` is the floor that
any gradient-based score stands on: forward and backward with every weight's gradient, accumulated over parts of
`--batch` samples. Peak memory is the device allocator's, weights included (on a CPU the growth of
the resident set). Before anything is timed, the fused engine has to agree with the reference engine on two layers of
the same shape.

Flows, each as `name@samples`: plain; param_first, param_mix (LLM-Pruner); fast, lean, layerwise, auto (`calibrate` with
that `memory`, all orders), and with `-second` behind them what a recipe asks for, second order alone. Unless `--only`
names some, layerwise is left out, and all but plain, auto and auto-second run at the smallest number of samples alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import hywia_kernels as hk
from hywia_kernels.arch.facts import weight_bytes
from hywia_kernels.settings import ORDERS

from . import llm_pruner, models
from .agreement import BOUNDS, compare
from .memory import Peak, free, resident
from .rows import Row
from .session import Session, argv_of, at_least, common_arguments, make_parser, parse
from .timing import Reading, Timer

T = TypeVar("T")

MODULE = "benchmarks.bench_engine"
PLAIN = "plain"
PEERS = ("param_first", "param_mix")
MEMORY = ("fast", "lean", "layerwise", "auto")  # of `calibrate`
SECOND = "-second"  # the recipe's order alone
FLOWS = (PLAIN, *PEERS, *MEMORY, *(memory + SECOND for memory in MEMORY))
UNASKED = (PLAIN, *PEERS, "fast", "lean", "auto", "fast-second", "lean-second")
UNASKED_AT_MORE_SAMPLES = (PLAIN, "auto", "auto-second")


TIMES = dict.fromkeys(("seconds", "seconds_p20", "seconds_p80"), float)
MODEL = {"shape": str, "layers": int, "dtype": str, "weights": str}
MEMORY_COLUMNS = {"peak_bytes": int, "weight_bytes": int, "peak_over_weights": float}
# `ratio_to_plain` is of the same samples in the same process; engine, memory and backend are what `calibrate` recorded.
COLUMNS = {
    **MODEL,
    "flow": str,
    "samples": int,
    "length": int,
    **TIMES,
    "runs": int,
    "seconds_per_sample": float,
    "ratio_to_plain": float,
    **MEMORY_COLUMNS,
    "engine": str,
    "memory": str,
    "backend": str,
}


def plain(model, tokens: Tensor, batch: int) -> None:
    """Gradient of the mean loss with respect to every weight."""
    model.zero_grad(set_to_none=True)
    for part in tokens.split(batch):
        (llm_pruner.loss(model, part) * (len(part) / len(tokens))).backward()


def flow_call(flow: str, model, tokens: Tensor, batch: int) -> Callable[[], object]:
    if flow == PLAIN:
        return lambda: plain(model, tokens, batch)
    if flow in PEERS:
        return lambda: llm_pruner.score(model, tokens, flow)
    memory, second = flow.removesuffix(SECOND), flow.endswith(SECOND)
    return lambda: hk.calibrate(model, tokens, memory=memory, orders=("second",) if second else ORDERS)


def planned(samples: Sequence[int], only: Sequence[str]) -> list[tuple[str, int]]:
    """`(flow, samples)` in the order of measurement: what each needs as its yardstick comes first."""
    plan = []
    for count in sorted(samples):
        for flow in FLOWS:
            unasked = UNASKED if count == min(samples) else UNASKED_AT_MORE_SAMPLES
            if (flow in only or f"{flow}@{count}" in only) if only else flow in unasked:
                plan.append((flow, count))
    return plan


def once(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of one call, the device synchronised, and its result."""
    _synchronize(device)
    began = time.perf_counter()
    result = call()
    _synchronize(device)
    return time.perf_counter() - began, result


class Measured(NamedTuple):
    """Times in seconds, peak bytes (see `Peak`), and the result of the last call."""

    reading: Reading
    peak: int | None
    result: object

    def columns(self, model: nn.Module) -> dict[str, float | int | None]:
        """The row's columns of times and memory, the latter also as a multiple of the bytes of the model's weights."""
        weights = weight_bytes(model)
        over = self.peak / weights if self.peak else None
        memory = {"peak_bytes": self.peak, "weight_bytes": weights, "peak_over_weights": over}
        return {**self.reading.columns("seconds"), "runs": self.reading.runs, **memory}


def measure(call: Callable[[], object], device: torch.device, runs: int, limit: float, base: int = 0) -> Measured:
    """Times `call` after a warm-up: `runs` times, or at least twice once they took `limit` seconds together."""
    once(call, device)
    free(device)
    peak = Peak(device, base)
    times: list[float] = []
    result: object = None
    while len(times) < runs and (len(times) < 2 or sum(times) < limit):
        seconds, result = once(call, device)
        times.append(seconds)
    return Measured(Reading.of(times), peak.bytes(), result)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check(shape: str, samples: int, length: int, device: torch.device) -> list[str]:
    """Compares the engines on two layers in two dtypes, and returns a message for each disagreement."""
    failures = []
    for dtype, bound in BOUNDS.items():
        model = models.build(shape, 2, dtype, device)
        tokens = models.token_ids(model, samples, length, device)
        fused, autograd = (hk.calibrate(model, tokens, engine=engine) for engine in ("fused", "autograd"))
        agreement = compare(fused, autograd)
        kept = ", ".join(f"{share:.2%} of the units kept at {ratio:.0%}" for ratio, share in agreement.kept.items())
        errors = f"fine {agreement.fine:.1e}, coarse {agreement.coarse:.1e} (allowed {bound:.0e})"
        line = f"{dtype} by {fused.record['backend']}: {errors}; same {kept}"
        print(f"fused against autograd, 2 layers, {line}", flush=True)
        if not agreement.within(bound):
            failures.append(f"engines disagree: {line}")
        del model, tokens, fused, autograd
        free(device)
    return failures


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(MODULE, __doc__)
    common_arguments(parser, runs=5, model=models.NAMES)
    parser.add_argument("--samples", type=at_least(1), nargs="+", metavar="N", help="default: 10 128 512 on a GPU")
    parser.add_argument("--length", type=at_least(2), default=128, help="tokens a sample")
    parser.add_argument("--batch", type=at_least(1), default=32, help="samples a backward of `plain`")
    parser.add_argument("--only", nargs="+", default=[], metavar="FLOW[@N]", help="flows to measure")
    add_limit(parser)
    parser.add_argument("--no-check", action="store_true", help="do not compare the engines first")
    arguments = parse(parser, argv, models.SMOLLM2)
    arguments.samples = arguments.samples or ([10, 128, 512] if arguments.device.type == "cuda" else [10])
    if unknown := {name.partition("@")[0] for name in arguments.only} - set(FLOWS):
        parser.error(f"--only: expected flows out of {', '.join(FLOWS)}, got {', '.join(sorted(unknown))}")
    if not planned(arguments.samples, arguments.only):
        parser.error(f"--only: names no flow at --samples {arguments.samples}")
    return arguments


def add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=float, default=20, help="seconds after which two readings are enough")


_ROW = "{:<16} {:>10} {:>19} {:>4} {:>11} {:>8} {:>9} {:>9}  {}"
_HEADER = _ROW.format("flow", "s", "20 %..80 %", "runs", "ms/sample", "×plain", "peak GB", "×weights", "by")


def cells(row: Row) -> dict[str, str]:
    """The columns of times and memory as the printed tables have them."""
    return {
        "seconds": f"{row.seconds:.4f}",
        "range": f"{row.seconds_p20:.4f}..{row.seconds_p80:.4f}",
        "peak": f"{row.peak_bytes / 1e9:.2f}" if row.peak_bytes else "",
        "over": f"{row.peak_over_weights:.2f}" if row.peak_over_weights else "",
    }


def _line(row: Row) -> str:
    text = cells(row)
    return _ROW.format(
        f"{row.flow}@{row.samples}",
        text["seconds"],
        text["range"],
        row.runs,
        f"{row.seconds_per_sample * 1e3:.2f}",
        f"{row.ratio_to_plain:.2f}" if row.ratio_to_plain else "",
        text["peak"],
        text["over"],
        ", ".join(filter(None, (row.engine, row.memory, row.backend))),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 when the engines disagree or a flow failed."""
    argv = argv_of(argv)
    arguments = _arguments(argv)
    device = arguments.device
    # The timer's buffers go before any peak is read.
    session = Session(arguments, MODULE, argv, COLUMNS, Timer(device, 10))
    if not arguments.no_check:
        session.failures += check(arguments.shape, 4, arguments.length, device)
    free(device)
    base = resident()
    model = models.build(arguments.shape, arguments.layers, arguments.dtype, device)
    described = models.description(model, arguments.shape, arguments.dtype)
    print(
        f"\n{described['shape']}, {described['layers']} layers, {described['dtype']}: "
        f"{weight_bytes(model) / 1e9:.2f} GB of {described['weights']} weights; "
        f"random tokens, {arguments.length} a sample"
    )
    print(f"\n{_HEADER}", flush=True)
    floors: dict[int, float] = {}
    for flow, count in planned(arguments.samples, arguments.only):
        tokens = models.token_ids(model, count, arguments.length, device)
        try:
            call = flow_call(flow, model, tokens, arguments.batch)
            measured = measure(call, device, arguments.runs, arguments.limit, base)
        except Exception as problem:  # out of memory, most likely: the other flows may still run
            message = str(problem).partition("\n")[0]
            session.fail(f"{flow}@{count}: {type(problem).__name__}: {message}")
        else:
            seconds = measured.reading.median
            if flow == PLAIN:
                floors[count] = seconds
            record = measured.result.record if isinstance(measured.result, hk.Statistics) else {}
            row = session.add(
                **described,
                flow=flow,
                samples=count,
                length=arguments.length,
                **measured.columns(model),
                seconds_per_sample=seconds / count,
                ratio_to_plain=seconds / floors[count] if count in floors else None,
                **{name: str(record.get(name, "")) for name in ("engine", "memory", "backend")},
            )
            print(_line(row), flush=True)
            del measured
        model.zero_grad(set_to_none=True)
        free(device)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
