"""How long the recipe of `hywia prune` takes on a whole model, step by step, beside LLM-Pruner's param_mix scoring.

    python -m benchmarks.bench_recipe                       # LLaMA-7B's shapes, random weights, on a GPU
    python -m benchmarks.bench_recipe --shape tiny --device cpu

Scoring, fusion and planning are timed `--runs` times after a warm-up; the refit, the choice of heads that goes
with it, and the cut run once. LLM-Pruner's flow is `benchmarks/llm_pruner.py`'s, with its ten samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import hywia_kernels as hk
from hywia_kernels.commands_recipe import REFIT_SAMPLES, SAMPLES
from hywia_kernels.deploy.hardware import device_name

from . import llm_pruner, models
from .bench_engine import measure, once
from .environment import commit
from .memory import free
from .session import argv_of, common_arguments, make_parser, parse

STEPS = ("param_mix", "calibrate", "fuse", "plan", "leftover", "refit", "prune")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Step -> seconds."""
    device = arguments.device
    torch.manual_seed(arguments.seed)
    model = models.build(arguments.shape, arguments.layers, arguments.dtype, device)
    tokens = {n: models.token_ids(model, n, 128, device) for n in (10, arguments.samples, arguments.refit_samples)}
    found: dict[str, float] = {}

    def several(name: str, call: Callable[[], Any]) -> Any:
        measured = measure(call, device, arguments.runs, 20.0)
        found[name] = measured.reading.median
        return measured.result

    several("param_mix", lambda: llm_pruner.score(model, tokens[10], "param_mix"))
    model.zero_grad(set_to_none=True)
    free(device)
    scored, refitted = tokens[arguments.samples].cpu(), tokens[arguments.refit_samples].cpu()
    statistics = several("calibrate", lambda: hk.calibrate(model, scored))
    scores = several("fuse", lambda: hk.fuse(statistics))
    found["leftover"], measured = once(lambda: hk.leftover(model, scored), device)
    scores = hk.with_leftover(scores, measured)
    plan = several("plan", lambda: hk.plan(scores, ratio=arguments.ratio, align=arguments.align))
    found["refit"], plan = once(lambda: hk.refit(model, plan, refitted), device)
    found["prune"], _ = once(lambda: hk.prune(model, plan), device)
    return found


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("benchmarks.bench_recipe", __doc__)
    common_arguments(parser, runs=3, model=models.NAMES, csv=False)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--refit-samples", type=int, default=REFIT_SAMPLES)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--align", type=int, default=64)
    return parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv_of(argv))
    found = run(arguments)
    print(f"{device_name(arguments.device)}, torch {torch.__version__}, commit {commit()}")
    print("| step | s |\n| --- | --- |")
    for name in STEPS:
        print(f"| {name} | {found[name]:.3f} |")
    ours = sum(found[name] for name in ("calibrate", "fuse", "plan", "prune"))
    print(f"| all but the refit and what goes with it | {ours:.3f} |")
    print(f"| times param_mix | {ours / found['param_mix']:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
