"""SmolLM2-135M-Instruct on a CPU, dense and as `hywia prune --ratio` makes it: `python -m benchmarks.bench_smollm2`.

Each model is made by the command itself, with its recipe and what follows `--` (`-- --calib c4.jsonl --text wiki.txt`),
written, loaded again and timed; its perplexity is what the command measured before and after. All are timed in turns,
dense among them, back and forth, so that what else the machine does hits them alike: a speed-up is the median over the
turns of dense time over pruned time. `--clock process` counts the process's own time, for a machine that is not quiet,
though its neighbours' use of memory still shows. By default layers are compiled, the cache is static, and one thread
runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import hywia_kernels as hk
from hywia_kernels import cli
from hywia_kernels.deploy.cost import Cost, cost_of
from hywia_kernels.deploy.speed import Case
from hywia_kernels.engine.static_driver import StaticDriver, drivable

from .bench_pruned import ideal
from .environment import Environment
from .rows import Appender, Columns, Row

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
PHASES = ("prefill", "decode")
COLUMNS: Columns = {
    **dict.fromkeys(("model", "made_by", "phase", "clock"), str),
    **dict.fromkeys(("kv_groups", "channels", "parameters", "context", "runs"), int),
    **dict.fromkeys(("removed", "perplexity", "ms", "tokens_per_second"), float),
    **dict.fromkeys(("speedup", "speedup_p20", "speedup_p80", "ideal", "share"), float),
    "compiled": bool,
}
TURNS_A_PROMPT = 3  # a prompt is timed in every third turn, since it takes as long as many steps


@dataclass(frozen=True)
class Made:
    """A model to time. `widths`: KV groups and channels of the first layer."""

    name: str
    command: str  # that made it, "" for the dense one
    perplexity: float
    widths: tuple[int, int]
    work: Cost
    calls: dict[str, Callable[[], Any]]


def pruned(model: str, ratio: float, folder: Path, more: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Runs `hywia prune` into `folder`; returns the command as a user would write it, and its report."""
    report = folder.with_name(folder.name + ".json")
    arguments = [
        "prune",
        model,
        "-o",
        str(folder),
        "--ratio",
        str(ratio),
        "--device",
        "cpu",
        "--json",
        str(report),
        *more,
    ]
    code = cli.main(arguments)
    if code != 0:
        raise SystemExit(code)
    measured = json.loads(report.read_text())
    if "before" not in measured:
        raise SystemExit("--: expected options that leave the evaluation on; speed without perplexity says nothing")
    return shlex.join(["hywia", *arguments[: arguments.index("-o")], "--ratio", str(ratio), *more]), measured


def made(source: str, name: str, command: str, perplexity: float, context: int, compile: bool) -> Made:
    """Loads a model, ready to be timed. `source` is a name or a directory."""
    model, _ = hk.load(source, device="cpu", dtype="float32")
    reason = drivable(model, context)
    if reason is not None:
        raise SystemExit(f"{source}: cannot be timed with a static cache: {reason}")
    driver = StaticDriver(model, 1, context, compile=compile)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt, token = torch.arange(context)[None] % vocabulary, torch.zeros((1, 1), dtype=torch.int64)
    last = torch.tensor([context - 1])
    calls = {"prefill": lambda: driver.prefill(prompt), "decode": lambda: driver.step(token, last)}
    units = {g.kind: g.units for g in reversed(hk.groups(model))}
    return Made(name, command, perplexity, (units["attention"], units["mlp"]), cost_of(model), calls)


def in_turns(models: Sequence[Made], runs: int, clock: Callable[[], float]) -> dict[str, list[list[float]]]:
    """Phase -> for each model its seconds, turn by turn."""
    for model in models:
        for call in model.calls.values():
            call()
            call()
    times: dict[str, list[list[float]]] = {phase: [[] for _ in models] for phase in PHASES}
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        for turn in range(runs):
            for phase in PHASES:
                if phase == "prefill" and turn % TURNS_A_PROMPT:
                    continue
                order = range(len(models))
                for i in order if turn % 2 == 0 else reversed(order):
                    began = clock()
                    models[i].calls[phase]()
                    times[phase][i].append(clock() - began)
    return times


def figures(models: Sequence[Made], times: dict[str, list[list[float]]], context: int) -> list[dict[str, Any]]:
    """The rows, one a phase and model. The models are compared with the first one, turn by turn."""
    rows = []
    for phase in PHASES:
        for model, seconds in zip(models, times[phase], strict=True):
            ratios = [dense / own for dense, own in zip(times[phase][0], seconds, strict=True)]
            best = ideal(Case(phase, 1, context), models[0].work, model.work)
            median = statistics.median(seconds)
            deciles = statistics.quantiles(ratios, n=10, method="inclusive")
            speedup = statistics.median(ratios)
            rows.append(
                {
                    "model": model.name,
                    "made_by": model.command,
                    "kv_groups": model.widths[0],
                    "channels": model.widths[1],
                    "parameters": model.work.parameters,
                    "removed": 1 - model.work.parameters / models[0].work.parameters,
                    "perplexity": model.perplexity,
                    "phase": phase,
                    "context": context,
                    "runs": len(seconds),
                    "ms": median * 1e3,
                    "tokens_per_second": (context if phase == "prefill" else 1) / median,
                    "speedup": speedup,
                    "speedup_p20": deciles[1],
                    "speedup_p80": deciles[7],
                    "ideal": best,
                    "share": speedup / best,
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = given.index("--") if "--" in given else len(given)
    own, more = given[:at], given[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_smollm2",
        description=__doc__.split("\n")[0],
        epilog="what follows -- goes to hywia prune",
    )
    parser.add_argument("--model", default="smollm2", help="as hywia prune takes it; default: smollm2")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="that are timed; pruning takes what torch takes")
    parser.add_argument("--runs", type=int, default=30, help="turns; a prompt is timed in every third")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append a row per figure")
    options = parser.parse_args(own)
    if options.runs < 2 * TURNS_A_PROMPT:
        parser.error(f"--runs: expected at least {2 * TURNS_A_PROMPT}, got {options.runs}")
    with tempfile.TemporaryDirectory() as room:
        reports = [pruned(options.model, r, Path(room) / f"{r}", more) for r in options.ratios]
        threads = torch.get_num_threads()
        torch.set_num_threads(options.threads)
        try:
            models = [
                made(
                    options.model, "dense", "", reports[0][1]["before"]["perplexity"], options.context, options.compile
                )
            ]
            for ratio, (command, report) in zip(options.ratios, reports, strict=True):
                told = report["after"]["perplexity"], options.context, options.compile
                models.append(made(str(Path(room) / f"{ratio}"), f"--ratio {ratio}", command, *told))
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 4 * len(models))
            rows = figures(models, in_turns(models, options.runs, CLOCKS[options.clock]), options.context)
            torch._dynamo.config.recompile_limit = limit
        finally:
            torch.set_num_threads(threads)
    device = torch.device("cpu")
    environment = replace(Environment.record(device, "benchmarks.bench_smollm2", given, 0), threads=options.threads)
    for row in rows:
        row |= {"clock": options.clock, "compiled": options.compile}
    print(f"{environment.device}, {options.threads} threads, torch {environment.torch}, {options.clock} clock")
    for row in rows:
        print(
            f"{row['phase']:<8}{row['model']:<14}{row['kv_groups']:>3} KV groups x {row['channels']:<6}"
            f"perplexity {row['perplexity']:8.2f}{row['ms']:10.2f} ms{row['tokens_per_second']:10.1f} tokens/s  "
            f"x{row['speedup']:.3f} ({row['speedup_p20']:.3f}..{row['speedup_p80']:.3f})  ideal x{row['ideal']:.3f}  "
            f"share {row['share']:.3f}"
        )
    if options.csv is not None:
        Appender(options.csv, COLUMNS).append([Row(environment, row) for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
