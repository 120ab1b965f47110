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
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import models
from .bench_engine import MEMORY_COLUMNS, MODEL, TIMES, Measured, add_limit, cells, measure
from .contracts import CONTRACTS, Case, Contract, backward, eager_attention
from .memory import free, resident
from .rows import Row
from .session import Session, argv_of, common_arguments, make_parser, parse
from .timing import Timer

MODULE = "benchmarks.bench_integrations"
TOOLS = tuple(CONTRACTS)


# `order` is "first" (scoring alone) or "second" (with the Fisher information), `side` "theirs" or "ours". times_faster
# is theirs over ours, error the largest difference of scores relative to a group's largest, kept the share of the kept
# half in common.
COLUMNS = {
    **MODEL,
    "tool": str,
    "tool_version": str,
    "criterion": str,
    "order": str,
    "side": str,
    "samples": int,
    "length": int,
    **TIMES,
    "runs": int,
    "times_faster": float,
    **MEMORY_COLUMNS,
    "error": float,
    "kept": float,
}


def scored(contract: Contract, make: Callable[[], Any], prepare: Callable[[], None] | None) -> list[Tensor]:
    """Scores all groups once, as a pruner's step does; returns a float32 vector for each group that the scorer takes,
    on the CPU."""
    if prepare is not None:
        prepare()
    scorer = make()
    # Torch-Pruning's own steps read each weight once without being told.
    unchanged = getattr(scorer, "unchanged", contextlib.nullcontext)
    with torch.no_grad(), unchanged():
        scores = [contract.call(scorer, group) for group in contract.groups]
    return [vector.float().cpu() for vector in scores if vector is not None]


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
    parser = make_parser(MODULE, __doc__)
    common_arguments(parser, runs=5, model=models.NAMES)
    parser.add_argument(
        "--only", nargs="+", choices=TOOLS, default=TOOLS, metavar="TOOL", help=f"of {', '.join(TOOLS)}"
    )
    parser.add_argument("--criteria", nargs="+", default=[], metavar="NAME", help="default: all of a tool's")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128, help="tokens a sample")
    add_limit(parser)
    return parse(parser, argv, models.SMOLLM2)


_ROW = "{:<14} {:<31} {:<7} {:>10} {:>21} {:>7} {:>8} {:>9} {:>9} {:>8}"
_HEADER = _ROW.format("tool", "criterion", "side", "s", "20 %..80 %", "faster", "peak GB", "×weights", "error", "kept")


def _line(row: Row) -> str:
    text = cells(row)
    return _ROW.format(
        row.tool,
        f"{row.criterion} ({row.order})",
        row.side,
        text["seconds"],
        text["range"],
        f"{row.times_faster:.2f}" if row.times_faster else "",
        text["peak"],
        text["over"],
        f"{row.error:.1e}" if row.error is not None else "",
        f"{row.kept:.2%}" if row.kept is not None else "",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 when a comparison or a measurement failed."""
    argv = argv_of(argv)
    arguments = _arguments(argv)
    device = arguments.device
    session = Session(arguments, MODULE, argv, COLUMNS, Timer(device, 10))
    free(device)
    base = resident()
    model = models.build(arguments.shape, arguments.layers, arguments.dtype, device)
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    tokens = models.token_ids(model, arguments.samples, arguments.length, device)
    print(f"\n{_HEADER}", flush=True)
    for tool in arguments.only:
        try:
            began = time.perf_counter()
            with eager_attention(model):
                contract = CONTRACTS[tool](model, tokens)
            print(f"{tool} {contract.version}: {len(contract.groups)} groups, {time.perf_counter() - began:.1f} s")
        except Exception as problem:
            session.fail(f"{tool}: {type(problem).__name__}: {problem}")
            continue
        for case in contract.cases:
            if arguments.criteria and case.criterion not in arguments.criteria:
                continue
            try:
                _measure(tool, contract, case, arguments, session, model, tokens, base)
            except Exception as problem:  # out of memory, most likely: the others may still run
                session.fail(f"{tool} {case.criterion}: {type(problem).__name__}: {problem}")
            _clean(model, device)
        del contract
    return session.finish()


def _clean(model: Any, device: torch.device) -> None:
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.__dict__.pop("acc_grad", None)
    free(device)


def _measure(
    tool: str,
    contract: Contract,
    case: Case,
    arguments: argparse.Namespace,
    session: Session,
    model: Any,
    tokens: Tensor,
    base: int,
) -> None:
    """Measures both sides and adds a row for each. Ours is measured first, since upstream sorts the groups' lists."""
    device = arguments.device
    sides: dict[str, Measured] = {}
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
    theirs, ours = sides["theirs"], sides["ours"]
    error, kept = agreement(theirs.result, ours.result) if case.comparable else (None, None)  # type: ignore[arg-type]
    bound = 1e-5 if arguments.dtype == "float32" else 3e-2
    if error is not None and not error <= bound:
        session.fail(f"{tool} {case.criterion}: scores differ by {error:.1e} (allowed {bound:.0e})")
    compared = {"times_faster": theirs.reading.median / ours.reading.median, "error": error, "kept": kept}
    for side, measured in sides.items():
        row = session.add(
            **models.description(model, arguments.shape, arguments.dtype),
            tool=tool,
            tool_version=contract.version,
            criterion=case.criterion,
            order=case.order,
            side=side,
            samples=arguments.samples,
            length=arguments.length,
            **measured.columns(model),
            **(compared if side == "ours" else dict.fromkeys(compared)),
        )
        print(_line(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
