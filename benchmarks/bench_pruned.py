"""Speed of pruned models, LLaMA-7B's shapes with random weights: `python -m benchmarks.bench_pruned --help`.

Dense, this package's uniform widths at 20 % and 50 %, and LLM-Pruner's own at both (24 of 32 heads and 8,256 of 11,008
channels kept in layers [4, 30); 13 heads and 4,403 channels in [3, 31)), in one run, by `hywia_kernels.speed`: layers
compiled, a static cache, one CUDA graph a step. Each figure stands beside the ideal: dense FLOPs over the pruned
model's for prefill, bytes for decoding. Widths by hand: `--models dense 22x9232 24x8256@4:30`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hywia_kernels import arch, surgery
from hywia_kernels.speed import MODES, Case, Work, measure, work_of

from . import models
from .rows import Appender
from .timing import Environment, Timer

# Ours at 20 % and 50 % follow from hywia_kernels.targets for an H100: equal shares of heads and channels, moved to the
# nearest pair that its sweep says is fast.
MODELS = ("dense", "22x9232", "24x8256@4:30", "16x5120", "13x4403@3:31")
CASES = (Case("prefill", 1, 2048), Case("prefill", 8, 512), Case("decode", 1, 512), Case("decode", 16, 512))


@dataclass(frozen=True)
class SpeedRow:
    """One row of speed.csv."""

    date: str
    device: str
    torch: str
    triton: str
    cuda: str
    threads: int
    commit: str
    command: str
    shape: str
    dtype: str
    model: str  # dense, or HEADSxCHANNELS[@FIRST:END]
    parameters: int
    removed: float
    mode: str
    phase: str
    batch: int
    context: int
    ms: float
    ms_p20: float
    ms_p80: float
    runs: int
    tokens_per_second: float
    speedup: float  # over the first model of the run
    ideal: float  # by FLOPs (prefill) or bytes (decode)
    share: float  # speed-up over ideal
    flop_s: float
    byte_s: float
    peak_bytes: int | None
    copy_gb_s: float
    matmul_tflop_s: float


def counts(model, text: str) -> dict[str, int]:
    """Group name -> units, of `HEADSxCHANNELS[@FIRST:END]`; heads are KV heads."""
    widths, _, span = text.partition("@")
    heads, channels = (int(w) for w in widths.split("x"))
    first, end = (int(n) for n in span.split(":")) if span else (0, 10**9)
    wanted = {"attention": heads, "mlp": channels}
    return {g.name: wanted[g.kind] for g in arch.groups(model) if first <= g.layer < end}


def build(shape: str, text: str, layers: int | None, dtype: str, device: torch.device):
    """Random weights of those widths, made on the device."""
    resize = None if text == "dense" else lambda model: surgery.resize(model, counts(model, text))
    return models.build(shape, layers, dtype, device, resize)


def ideal(case: Case, before: Work, after: Work) -> float:
    if case.phase == "prefill":
        return before.prefill_flops(case.batch, case.context) / after.prefill_flops(case.batch, case.context)
    return before.decode_bytes(case.batch, case.context) / after.decode_bytes(case.batch, case.context)


def show(rows: Sequence[SpeedRow], names: Sequence[str], mode: str) -> None:
    """A line a model, a column a case: ms, speed-up, share of the ideal."""
    rows = [r for r in rows if r.mode == mode]
    columns = list(dict.fromkeys((r.phase, r.batch, r.context) for r in rows))
    print(f"\n{mode}: ms, x over {names[0]}, share of ideal")
    print(f"{'model':<16}{'parameters':>14}" + "".join(f"{f'{p} {b}x{c}':>26}" for p, b, c in columns))
    for name in names:
        found = {(r.phase, r.batch, r.context): r for r in rows if r.model == name}
        if found:
            first = next(iter(found.values()))
            cells = (f"{r.ms:9.3f} {r.speedup:6.3f} {r.share:6.3f}" for r in (found[c] for c in columns if c in found))
            print(f"{name:<16}{first.parameters:>14,}" + "".join(f"{cell:>26}" for cell in cells))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_pruned", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=tuple(models.SHAPES), default="7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", choices=tuple(models.DTYPES), default="bfloat16")
    parser.add_argument("--models", nargs="+", help=f"default: {' '.join(MODELS)}; of tiny shapes dense alone")
    parser.add_argument("--modes", nargs="+", default=["static", "captured"], choices=MODES)
    parser.add_argument("--context", type=int, help="of every case instead of its own (for a trial)")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--csv", type=Path, help="append rows here")
    given = parser.parse_args(arguments)
    given.models = given.models or (list(MODELS) if given.shape == "7b" else ["dense"])
    device = torch.device(given.device)
    appender = Appender(given.csv, SpeedRow) if given.csv else None
    cases = [Case(c.phase, c.batch, given.context or c.context) for c in CASES]
    torch.manual_seed(0)
    timer = Timer(device, 7)
    own = sys.argv[1:] if arguments is None else list(arguments)
    found = Environment.record(timer, "benchmarks.bench_pruned", own, 0)
    del timer  # and its buffers
    print(
        f"{found.device}, torch {found.torch}: product {found.matmul_tflop_s:.0f} TFLOP/s, copy {found.copy_gb_s:.0f}"
    )
    rows: list[SpeedRow] = []
    first: Work | None = None
    for name in given.models:
        began = time.perf_counter()
        model = build(given.shape, name, given.layers, given.dtype, device)
        work = work_of(model)
        first = first or work
        got, reason = measure(model, cases, modes=given.modes, runs=given.runs)
        if reason is not None:
            print(f"{name}: no static figures: {reason}")
        for m in got:
            case = Case(m.phase, m.batch, m.context)
            base = next(
                (r for r in rows if (r.mode, r.phase, r.batch, r.context) == (m.mode, *vars(case).values())), None
            )
            speedup, best = (base.ms if base else m.ms) / m.ms, ideal(case, first, work)
            rows.append(
                SpeedRow(
                    found.date, found.device, found.torch, found.triton, found.cuda, found.threads, found.commit,
                    found.command, given.shape, given.dtype, name, work.parameters,
                    1 - work.parameters / first.parameters, m.mode, m.phase, m.batch, m.context, m.ms, m.ms_p20,
                    m.ms_p80, m.runs, m.tokens_per_second, speedup, best, speedup / best, m.flop_s, m.byte_s,
                    m.peak_bytes,
                    found.copy_gb_s, found.matmul_tflop_s,
                )
            )  # fmt: skip
        if appender is not None:
            appender.append([r for r in rows if r.model == name])
        del model
        print(f"{name}: measured in {time.perf_counter() - began:.0f} s", flush=True)
    for mode in given.modes:
        show(rows, given.models, mode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
