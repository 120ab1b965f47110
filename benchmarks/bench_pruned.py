"""Speed of pruned models, LLaMA-7B's shapes with random weights: `python -m benchmarks.bench_pruned --help`.

Dense, this package's uniform widths at 20 % and 50 %, and LLM-Pruner's own at both (24 of 32 heads and 8,256 of 11,008
channels kept in layers [4, 30); 13 heads and 4,403 channels in [3, 31)), in one run, by `hywia_kernels.deploy.speed`:
layers compiled, a static cache, one CUDA graph a step. Each figure stands beside the ideal: dense FLOPs over the pruned
model's for prefill, bytes for decoding. Widths by hand: `--models dense 22x9232 24x8256@4:30`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from hywia_kernels import arch
from hywia_kernels.deploy.cost import Cost, cost_of
from hywia_kernels.deploy.speed import MODES, Case, measure
from hywia_kernels.method import surgery

from . import models
from .rows import Row
from .session import Session, argv_of, common_arguments, make_parser, parse
from .timing import Timer

MODULE = "benchmarks.bench_pruned"
# Ours at 20 % and 50 % follow from the profile of an H100: equal shares of heads and channels, moved to the nearest
# pair that its sweep says is fast.
MODELS = ("dense", "22x9232", "24x8256@4:30", "16x5120", "13x4403@3:31")
CASES = (Case("prefill", 1, 2048), Case("prefill", 8, 512), Case("decode", 1, 512), Case("decode", 16, 512))


# `model` is dense, or HEADSxCHANNELS[@FIRST:END]; speedup is over the first model of the run, ideal by FLOPs (prefill)
# or bytes (decode), share the speed-up over the ideal.
COLUMNS = {
    "shape": str,
    "dtype": str,
    "model": str,
    "parameters": int,
    "removed": float,
    "mode": str,
    "phase": str,
    "batch": int,
    "context": int,
    **dict.fromkeys(("ms", "ms_p20", "ms_p80"), float),
    "runs": int,
    **dict.fromkeys(("tokens_per_second", "speedup", "ideal", "share", "flop_s", "byte_s"), float),
    "peak_bytes": int,
}


def counts(model, text: str) -> dict[str, int]:
    """Group name -> units, of `HEADSxCHANNELS[@FIRST:END]`; heads are KV heads."""
    widths, _, span = text.partition("@")
    heads, channels = (int(w) for w in widths.split("x"))
    first, end = (int(n) for n in span.split(":")) if span else (0, 10**9)
    wanted = {"attention": heads, "mlp": channels}
    return {g.name: wanted[g.kind] for g in arch.groups(model) if first <= g.layer < end}


def build(shape: str, text: str, layers: int | None, dtype: str, device: torch.device):
    """A model with random weights of these widths (see `counts`; "dense" for the shape's own), made on the device."""
    resize = None if text == "dense" else lambda model: surgery.resize(model, counts(model, text))
    return models.build(shape, layers, dtype, device, resize)


def ideal(case: Case, before: Cost, after: Cost) -> float:
    if case.phase == "prefill":
        return before.prefill_flops(case.batch, case.context) / after.prefill_flops(case.batch, case.context)
    return before.decode_bytes(case.batch, case.context) / after.decode_bytes(case.batch, case.context)


def show(rows: Sequence[Row], names: Sequence[str], mode: str) -> None:
    """Prints a line a model and a column a case: ms, speed-up, and share of the ideal speed-up."""
    rows = [r for r in rows if r.mode == mode]
    columns = list(dict.fromkeys((r.phase, r.batch, r.context) for r in rows))
    print(f"\n{mode}: ms, x over {names[0]}, share of ideal")
    print(f"{'model':<16}{'parameters':>14}" + "".join(f"{f'{p} {b}x{c}':>26}" for p, b, c in columns))
    for name in names:
        by_case = {(r.phase, r.batch, r.context): r for r in rows if r.model == name}
        if by_case:
            first = next(iter(by_case.values()))
            cells = (
                f"{r.ms:9.3f} {r.speedup:6.3f} {r.share:6.3f}" for r in (by_case[c] for c in columns if c in by_case)
            )
            print(f"{name:<16}{first.parameters:>14,}" + "".join(f"{cell:>26}" for cell in cells))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(MODULE, __doc__)
    common_arguments(parser, runs=20, model=models.SHAPES)
    parser.add_argument("--models", nargs="+", help=f"default: {' '.join(MODELS)}; of tiny shapes dense alone")
    parser.add_argument("--modes", nargs="+", default=["static", "captured"], choices=MODES)
    parser.add_argument("--context", type=int, help="of every case instead of its own (for a trial)")
    argv = argv_of(arguments)
    given = parse(parser, argv)
    given.models = given.models or (list(MODELS) if given.shape == "7b" else ["dense"])
    cases = [Case(c.phase, c.batch, given.context or c.context) for c in CASES]
    session = Session(given, MODULE, argv, COLUMNS, Timer(given.device, 7))
    first: Cost | None = None
    for name in given.models:
        began = time.perf_counter()
        model = build(given.shape, name, given.layers, given.dtype, given.device)
        work = cost_of(model)
        first = first or work
        got, reason = measure(model, cases, modes=given.modes, runs=given.runs)
        if reason is not None:
            print(f"{name}: no static figures: {reason}")
        for m in got:
            case = Case(m.phase, m.batch, m.context)
            place = (m.mode, m.phase, m.batch, m.context)
            base = next((r.ms for r in session.rows if (r.mode, r.phase, r.batch, r.context) == place), m.ms)
            speedup, best = base / m.ms, ideal(case, first, work)
            figures = {name: getattr(m, name) for name in COLUMNS if hasattr(m, name)}
            figures |= {"shape": given.shape, "dtype": given.dtype, "model": name, "parameters": work.parameters}
            removed = 1 - work.parameters / first.parameters
            session.add(**figures, removed=removed, speedup=speedup, ideal=best, share=speedup / best)
        del model
        print(f"{name}: measured in {time.perf_counter() - began:.0f} s", flush=True)
    for mode in given.modes:
        show(session.rows, given.models, mode)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
