"""How long the recipe of `hywia prune` takes on a whole model, step by step, beside LLM-Pruner's param_mix scoring.

    python -m benchmarks.bench_recipe                       # LLaMA-7B's shapes, random weights, on a GPU
    python -m benchmarks.bench_recipe --shape tiny --device cpu

Scoring is `hywia_kernels.measure` on random tokens, one fusion included, and is timed `--runs` times after a warm-up.
The other steps are those of `hywia_kernels.compress`, which runs once and records their seconds. LLM-Pruner's flow is
that of `benchmarks/llm_pruner.py`, with its ten samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import hywia_kernels as hk
from hywia_kernels import settings
from hywia_kernels.deploy.hardware import device_name

from . import llm_pruner, models
from .bench_engine import measure
from .environment import commit
from .memory import free
from .session import argv_of, common_arguments, make_parser, parse

STEPS = ("param_mix", "scoring", "fusion", "head ranking", "planning", "search", "reconstruction", "cut")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Step -> seconds."""
    device = arguments.device
    torch.manual_seed(arguments.seed)
    model = models.build(arguments.shape, arguments.layers, arguments.dtype, device)
    recipe = hk.Recipe(
        ratio=arguments.ratio,
        align=arguments.align,
        samples=arguments.samples,
        reconstruct_samples=arguments.reconstruct_samples,
    ).resolved(device.type)
    peer = models.token_ids(model, 10, 128, device)
    tokens = models.token_ids(model, recipe.text_samples(), 128, device).cpu()
    seconds: dict[str, float] = {}

    def several(name: str, call: Callable[[], Any]) -> Any:
        measured = measure(call, device, arguments.runs, 20.0)
        seconds[name] = measured.reading.median
        return measured.result

    several("param_mix", lambda: llm_pruner.score(model, peer, "param_mix"))
    model.zero_grad(set_to_none=True)
    free(device)
    measured = several("scoring", lambda: hk.measure(model, None, recipe, tokens=tokens))
    return seconds | hk.compress(model, None, recipe, measured=measured).record["seconds"]


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("benchmarks.bench_recipe", __doc__)
    common_arguments(parser, runs=3, model=models.NAMES, csv=False)
    parser.add_argument("--samples", type=int, default=settings.SAMPLES)
    parser.add_argument("--reconstruct-samples", type=int, help="default: the recipe's for the device")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--align", type=int, default=64)
    return parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv_of(argv))
    seconds = run(arguments)
    print(f"{device_name(arguments.device)}, torch {torch.__version__}, commit {commit()}")
    print("| step | s |\n| --- | --- |")
    for name in STEPS:
        if name not in seconds:  # there was nothing to search for
            continue
        print(f"| {name} | {seconds[name]:.3f} |")
    ours = sum(seconds[name] for name in ("scoring", "fusion", "planning", "cut"))
    print(f"| all but the reconstruction and what goes with it | {ours:.3f} |")
    print(f"| times param_mix | {ours / seconds['param_mix']:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
