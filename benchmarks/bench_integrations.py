"""Scoring through other tools' contracts: their scorers against ours on the same groups, in the same run.

    python -m benchmarks.bench_integrations                            # 7B shape on a GPU, SmolLM2 on a CPU
    python -m benchmarks.bench_integrations --layers 8 --only torch_pruning
    PYTHONPATH=LLM-Pruner python -m benchmarks.bench_integrations --only llm_pruner

Groups are the ones each tool's own pruner hands to its scorer; building them is not timed (`groups` says how long it
took). First order scores gradients that are there already; second order begins without gradients and includes what it
takes to get the Fisher information: theirs one backward a sample with accumulation, and for param_mix one more of the
batch, ours `accumulate_fisher`. Peak memory is the device allocator's, weights and gradients included; on a CPU the
growth of the resident set. Before anything is timed, both sides' scores and kept halves are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hywia_kernels.weights import weight_bytes

from . import models
from .bench_engine import measure
from .contracts import CONTRACTS, Case, Contract, backward, eager_attention
from .memory import free, resident
from .rows import Appender
from .timing import Environment, Timer

TOOLS = tuple(CONTRACTS)


@dataclass(frozen=True)
class IntegrationFigure:
    """One row of integrations.csv. New columns go to the end; earlier rows hold nothing there."""

    date: str
    tool: str
    tool_version: str
    shape: str
    layers: int
    dtype: str
    weights: str  # "random" or "pretrained"
    criterion: str
    order: str  # "first": scoring alone; "second": with the Fisher information
    side: str  # "theirs" or "ours"
    samples: int
    length: int
    seconds: float
    seconds_p20: float
    seconds_p80: float
    runs: int
    times_faster: float | None  # theirs over ours
    peak_bytes: int | None
    weight_bytes: int
    peak_over_weights: float | None
    error: float | None  # largest difference of scores, relative to a group's largest
    kept: float | None  # share of the kept half in common
    device: str
    threads: int
    python: str
    torch: str
    triton: str
    cuda: str
    commit: str
    seed: int
    command: str


def scored(contract: Contract, make: Callable[[], Any], prepare: Callable[[], None] | None) -> list[Tensor]:
    """One scoring of all groups, as a pruner's step does it: every vector comes to the CPU."""
    if prepare is not None:
        prepare()
    scorer = make()
    # Torch-Pruning's own steps read each weight once without being told.
    unchanged = getattr(scorer, "unchanged", contextlib.nullcontext)
    with torch.no_grad(), unchanged():
        found = [contract.call(scorer, group) for group in contract.groups]
    return [f.float().cpu() for f in found if f is not None]


def agreement(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> tuple[float, float]:
    """`(largest relative difference, share of the better half in common)`."""
    errors, common, total = [], 0, 0
    for a, b in zip(theirs, ours, strict=True):
        errors.append(float((a - b).abs().max() / a.abs().max()))
        half = len(a) // 2
        common += len(set(a.topk(half).indices.tolist()) & set(b.topk(half).indices.tolist()))
        total += half
    return max(errors), common / total


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--shape", choices=models.NAMES, help="default: 7b on a GPU, smollm2 on a CPU")
    parser.add_argument("--layers", type=int, metavar="N", help="the first N decoder layers only")
    parser.add_argument("--dtype", choices=tuple(models.DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--only", nargs="+", choices=TOOLS, default=TOOLS, metavar="TOOL", help=f"of {', '.join(TOOLS)}"
    )
    parser.add_argument("--criteria", nargs="+", default=[], metavar="NAME", help="default: all of a tool's")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128, help="tokens a sample")
    parser.add_argument("--runs", type=int, default=5, help="readings per figure")
    parser.add_argument("--limit", type=float, default=20, help="seconds after which two readings are enough")
    parser.add_argument("--seed", type=int, help="of weights and ids; default: a fresh one, which is recorded")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append a row per figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and figures")
    arguments = parser.parse_args(argv)
    cuda = (arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    arguments.device = torch.device("cuda" if cuda else "cpu")
    arguments.shape = arguments.shape or ("7b" if cuda else models.SMOLLM2)
    arguments.dtype = arguments.dtype or ("bfloat16" if cuda else "float32")
    if arguments.runs < 2:
        parser.error("--runs: expected at least 2")
    if arguments.seed is None:
        arguments.seed = torch.seed() % 2**32
    return arguments


_ROW = "{:<14} {:<31} {:<7} {:>10} {:>21} {:>7} {:>8} {:>9} {:>9} {:>8}"
_HEADER = _ROW.format("tool", "criterion", "side", "s", "20 %..80 %", "faster", "peak GB", "×weights", "error", "kept")


def _line(f: IntegrationFigure) -> str:
    return _ROW.format(
        f.tool,
        f"{f.criterion} ({f.order})",
        f.side,
        f"{f.seconds:.4f}",
        f"{f.seconds_p20:.4f}..{f.seconds_p80:.4f}",
        f"{f.times_faster:.2f}" if f.times_faster else "",
        f"{f.peak_bytes / 1e9:.2f}" if f.peak_bytes else "",
        f"{f.peak_over_weights:.2f}" if f.peak_over_weights else "",
        f"{f.error:.1e}" if f.error is not None else "",
        f"{f.kept:.2%}" if f.kept is not None else "",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 when a comparison or a measurement failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _arguments(argv)
    device = arguments.device
    table = Appender(arguments.csv, IntegrationFigure) if arguments.csv else None
    torch.manual_seed(arguments.seed)
    environment = Environment.record(Timer(device, 10), "benchmarks.bench_integrations", argv, arguments.seed)
    print("\n".join(f"{name}: {value}" for name, value in asdict(environment).items()))
    free(device)
    base = resident()
    model = models.build(arguments.shape, arguments.layers, arguments.dtype, device)
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    tokens = models.token_ids(model, arguments.samples, arguments.length, device)
    figures: list[IntegrationFigure] = []
    failures: list[str] = []
    print(f"\n{_HEADER}", flush=True)
    for tool in arguments.only:
        try:
            began = time.perf_counter()
            with eager_attention(model):
                contract = CONTRACTS[tool](model, tokens)
            print(f"{tool} {contract.version}: {len(contract.groups)} groups, {time.perf_counter() - began:.1f} s")
        except Exception as problem:
            failures.append(f"{tool}: {type(problem).__name__}: {problem}")
            print(failures[-1], flush=True)
            continue
        for case in contract.cases:
            if arguments.criteria and case.criterion not in arguments.criteria:
                continue
            try:
                for figure in _figures(tool, contract, case, arguments, environment, model, tokens, base, failures):
                    figures.append(figure)
                    print(_line(figure), flush=True)
            except Exception as problem:  # out of memory, most likely: the others may still run
                failures.append(f"{tool} {case.criterion}: {type(problem).__name__}: {problem}")
                print(failures[-1], flush=True)
            _clean(model, device)
        del contract
    if table:
        table.append(figures)
    if arguments.json:
        record = {"environment": asdict(environment), "figures": [asdict(f) for f in figures], "failures": failures}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if failures:
        print(f"\n{len(failures)} failed:", *failures, sep="\n")
    return 1 if failures else 0


def _clean(model: Any, device: torch.device) -> None:
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.__dict__.pop("acc_grad", None)
    free(device)


def _figures(
    tool: str,
    contract: Contract,
    case: Case,
    arguments: argparse.Namespace,
    environment: Environment,
    model: Any,
    tokens: Tensor,
    base: int,
    failures: list[str],
) -> list[IntegrationFigure]:
    """Ours first: upstream sorts the groups' lists."""
    device, weights = arguments.device, weight_bytes(model)
    sides = {}
    for side, make, prepare in (
        ("ours", case.ours, case.prepare_ours),
        ("theirs", case.theirs, case.prepare_theirs),
    ):
        _clean(model, device)
        if case.order == "first":
            backward(model, tokens)
        sides[side] = measure(
            lambda make=make, prepare=prepare: scored(contract, make, prepare),
            device,
            arguments.runs,
            arguments.limit,
            base,
        )
    error, kept = agreement(sides["theirs"][2], sides["ours"][2]) if case.comparable else (None, None)
    bound = 1e-5 if arguments.dtype == "float32" else 3e-2
    if error is not None and not error <= bound:
        failures.append(f"{tool} {case.criterion}: scores differ by {error:.1e} (allowed {bound:.0e})")
    ratio = sides["theirs"][0].median / sides["ours"][0].median
    return [
        IntegrationFigure(
            date=environment.date,
            tool=tool,
            tool_version=contract.version,
            shape=arguments.shape,
            layers=model.config.num_hidden_layers,
            dtype=arguments.dtype,
            weights="pretrained" if arguments.shape == models.SMOLLM2 else "random",
            criterion=case.criterion,
            order=case.order,
            side=side,
            samples=arguments.samples,
            length=arguments.length,
            seconds=reading.median,
            seconds_p20=reading.low,
            seconds_p80=reading.high,
            runs=reading.runs,
            times_faster=ratio if side == "ours" else None,
            peak_bytes=peak,
            weight_bytes=weights,
            peak_over_weights=peak / weights if peak else None,
            error=error if side == "ours" else None,
            kept=kept if side == "ours" else None,
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
        for side, (reading, peak, _) in sides.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
