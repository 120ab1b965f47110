"""Scoring of a whole model: `calibrate` against a plain forward and backward and against LLM-Pruner's flow.

    python -m benchmarks.bench_engine                                  # 7B shape on a GPU, SmolLM2 on a CPU
    python -m benchmarks.bench_engine --samples 10 128 --only plain param_mix@10 auto

Every time is the host clock of one whole call, device synchronised, median after a warm-up. `plain` is the floor that
any gradient-based score stands on: forward and backward with every weight's gradient, accumulated over parts of
`--batch` samples. Peak memory is the device allocator's, weights included (on a CPU the growth of
the resident set). Before anything is timed, the fused engine has to agree with the reference engine on two layers of
the same shape.

Flows, each as `name@samples`: plain; param_first, param_mix (LLM-Pruner); fast, lean, layerwise, auto (`calibrate` with
that `memory`). Unless `--only` names some, layerwise is left out, and all but plain and auto run at the smallest number
of samples alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

import hywia_kernels as hk
from hywia_kernels.weights import weight_bytes

from . import llm_pruner, models
from .agreement import BOUNDS, compare
from .memory import Peak, free, resident
from .rows import Appender
from .timing import Environment, Reading, Timer

T = TypeVar("T")

PLAIN = "plain"
PEERS = ("param_first", "param_mix")
MEMORY = ("fast", "lean", "layerwise", "auto")  # of `calibrate`
FLOWS = (PLAIN, *PEERS, *MEMORY)
UNASKED = (PLAIN, *PEERS, "fast", "lean", "auto")
UNASKED_AT_MORE_SAMPLES = (PLAIN, "auto")


@dataclass(frozen=True)
class EngineFigure:
    """One row of engine.csv. New columns go to the end; earlier rows hold nothing there."""

    date: str
    shape: str
    layers: int
    dtype: str
    weights: str  # "random" or "pretrained"
    flow: str
    samples: int
    length: int
    seconds: float
    seconds_p20: float
    seconds_p80: float
    runs: int
    seconds_per_sample: float
    ratio_to_plain: float | None  # of the same samples in the same process
    peak_bytes: int | None
    weight_bytes: int
    peak_over_weights: float | None
    engine: str  # what `calibrate` recorded: these three
    memory: str
    backend: str
    device: str
    threads: int
    python: str
    torch: str
    triton: str
    cuda: str
    commit: str
    seed: int
    command: str


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
    return lambda: hk.calibrate(model, tokens, memory=flow)


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


def measure(
    call: Callable[[], object], device: torch.device, runs: int, limit: float, base: int = 0
) -> tuple[Reading, int | None, object]:
    """Times in seconds, peak bytes (see `Peak`), and the last result; two runs are enough once `limit` seconds went."""

    once(call, device)
    free(device)
    peak = Peak(device, base)
    times: list[float] = []
    result: object = None
    while len(times) < runs and (len(times) < 2 or sum(times) < limit):
        seconds, result = once(call, device)
        times.append(seconds)
    return Reading.of(times), peak.bytes(), result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check(shape: str, samples: int, length: int, device: torch.device) -> list[str]:
    """Compare the engines on two layers in two dtypes; returns what failed."""
    failures = []
    for dtype, bound in BOUNDS.items():
        model = models.build(shape, 2, dtype, device)
        tokens = models.token_ids(model, samples, length, device)
        fused, autograd = (hk.calibrate(model, tokens, engine=engine) for engine in ("fused", "autograd"))
        found = compare(fused, autograd)
        kept = ", ".join(f"{share:.2%} of the units kept at {ratio:.0%}" for ratio, share in found.kept.items())
        errors = f"fine {found.fine:.1e}, coarse {found.coarse:.1e} (allowed {bound:.0e})"
        line = f"{dtype} by {fused.record['backend']}: {errors}; same {kept}"
        print(f"fused against autograd, 2 layers, {line}", flush=True)
        if not found.within(bound):
            failures.append(f"engines disagree: {line}")
        del model, tokens, fused, autograd
        free(device)
    return failures


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--shape", choices=models.NAMES, help="default: 7b on a GPU, smollm2 on a CPU")
    parser.add_argument("--layers", type=int, metavar="N", help="the first N decoder layers only")
    parser.add_argument("--dtype", choices=tuple(models.DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--samples", type=int, nargs="+", metavar="N", help="default: 10 128 512 on a GPU, 10 on a CPU")
    parser.add_argument("--length", type=int, default=128, help="tokens a sample")
    parser.add_argument("--batch", type=int, default=32, help="samples a backward of `plain`")
    parser.add_argument("--only", nargs="+", default=[], metavar="FLOW[@N]", help="flows to measure")
    parser.add_argument("--runs", type=int, default=5, help="readings per figure")
    parser.add_argument("--limit", type=float, default=20, help="seconds after which two readings are enough")
    parser.add_argument("--no-check", action="store_true", help="do not compare the engines first")
    parser.add_argument("--seed", type=int, help="of weights and ids; default: a fresh one, which is recorded")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append a row per figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and figures")
    arguments = parser.parse_args(argv)
    cuda = (arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device: no GPU is visible to torch")
    arguments.device = torch.device("cuda" if cuda else "cpu")
    arguments.shape = arguments.shape or ("7b" if cuda else models.SMOLLM2)
    arguments.dtype = arguments.dtype or ("bfloat16" if cuda else "float32")
    arguments.samples = arguments.samples or ([10, 128, 512] if cuda else [10])
    if min(arguments.runs, arguments.length) < 2:
        parser.error("--runs, --length: expected at least 2")
    if min(arguments.batch, *arguments.samples, 1 if arguments.layers is None else arguments.layers) < 1:
        parser.error("--batch, --samples, --layers: expected at least 1")
    if unknown := {name.partition("@")[0] for name in arguments.only} - set(FLOWS):
        parser.error(f"--only: expected flows out of {', '.join(FLOWS)}, got {', '.join(sorted(unknown))}")
    if not planned(arguments.samples, arguments.only):
        parser.error(f"--only: names no flow at --samples {arguments.samples}")
    if arguments.seed is None:
        arguments.seed = torch.seed() % 2**32
    return arguments


def _figure(flow: str, arguments, environment: Environment, model, count: int, measured, floor: float | None):
    reading, peak, result = measured
    weights = weight_bytes(model)
    record = result.record if isinstance(result, hk.Statistics) else {}
    return EngineFigure(
        date=environment.date,
        shape=arguments.shape,
        layers=model.config.num_hidden_layers,
        dtype=arguments.dtype,
        weights="pretrained" if arguments.shape == models.SMOLLM2 else "random",
        flow=flow,
        samples=count,
        length=arguments.length,
        seconds=reading.median,
        seconds_p20=reading.low,
        seconds_p80=reading.high,
        runs=reading.runs,
        seconds_per_sample=reading.median / count,
        ratio_to_plain=reading.median / floor if floor else None,
        peak_bytes=peak,
        weight_bytes=weights,
        peak_over_weights=peak / weights if peak else None,
        engine=str(record.get("engine", "")),
        memory=str(record.get("memory", "")),
        backend=str(record.get("backend", "")),
        device=environment.device,
        threads=environment.threads,
        python=environment.python,
        torch=environment.torch,
        triton=environment.triton,
        cuda=environment.cuda,
        commit=environment.commit,
        seed=environment.seed,
        command=environment.command,
    )


_ROW = "{:<16} {:>10} {:>19} {:>4} {:>11} {:>8} {:>9} {:>9}  {}"
_HEADER = _ROW.format("flow", "s", "20 %..80 %", "runs", "ms/sample", "×plain", "peak GB", "×weights", "by")


def _line(figure: EngineFigure) -> str:
    return _ROW.format(
        f"{figure.flow}@{figure.samples}",
        f"{figure.seconds:.4f}",
        f"{figure.seconds_p20:.4f}..{figure.seconds_p80:.4f}",
        figure.runs,
        f"{figure.seconds_per_sample * 1e3:.2f}",
        f"{figure.ratio_to_plain:.2f}" if figure.ratio_to_plain else "",
        f"{figure.peak_bytes / 1e9:.2f}" if figure.peak_bytes else "",
        f"{figure.peak_over_weights:.2f}" if figure.peak_over_weights else "",
        ", ".join(filter(None, (figure.engine, figure.memory, figure.backend))),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 when the engines disagree or a flow failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _arguments(argv)
    device = arguments.device
    table = Appender(arguments.csv, EngineFigure) if arguments.csv else None
    torch.manual_seed(arguments.seed)
    # The timer's buffers go before any peak is read.
    environment = Environment.record(Timer(device, 10), "benchmarks.bench_engine", argv, arguments.seed)
    print("\n".join(f"{name}: {value}" for name, value in asdict(environment).items()))
    failures = [] if arguments.no_check else check(arguments.shape, 4, arguments.length, device)
    free(device)
    base = resident()
    model = models.build(arguments.shape, arguments.layers, arguments.dtype, device)
    kind = "pretrained" if arguments.shape == models.SMOLLM2 else "random"
    print(
        f"\n{arguments.shape}, {model.config.num_hidden_layers} layers, {arguments.dtype}: "
        f"{weight_bytes(model) / 1e9:.2f} GB of {kind} weights; random tokens, {arguments.length} a sample"
    )
    print(f"\n{_HEADER}", flush=True)
    figures: list[EngineFigure] = []
    floors: dict[int, float] = {}
    for flow, count in planned(arguments.samples, arguments.only):
        tokens = models.token_ids(model, count, arguments.length, device)
        try:
            call = flow_call(flow, model, tokens, arguments.batch)
            measured = measure(call, device, arguments.runs, arguments.limit, base)
        except Exception as problem:  # out of memory, most likely: the other flows may still run
            message = str(problem).partition("\n")[0]
            failures.append(f"{flow}@{count}: {type(problem).__name__}: {message}")
            print(failures[-1], flush=True)
        else:
            if flow == PLAIN:
                floors[count] = measured[0].median
            figures.append(_figure(flow, arguments, environment, model, count, measured, floors.get(count)))
            print(_line(figures[-1]), flush=True)
            if table:
                table.append(figures[-1:])
            del measured
        model.zero_grad(set_to_none=True)
        free(device)
    if arguments.json:
        record = {"environment": asdict(environment), "figures": [asdict(f) for f in figures], "failures": failures}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if failures:
        print(f"\n{len(failures)} failed:", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
