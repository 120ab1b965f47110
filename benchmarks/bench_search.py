"""Whether the plan that a search takes is the best one: every split of a ratio measured, and what each search chooses.

    python -m benchmarks.bench_search --calib c4.jsonl --text valid.txt --max-blocks 100        # SmolLM2, half and 30 %
    python -m benchmarks.bench_search --calib c4.jsonl --text test.txt --search fast --csv benchmarks/search.csv
    python -m benchmarks.bench_search --calib c4.jsonl --text valid.txt --search fast --recover-tokens 4194304

The grid has a plan for every count of KV groups that meets the ratio, each with layers alike (spread 0) and with two
budgets of its own among layers (spreads 0.5 and 1; see `method.allocation`). Of each plan a copy of the model is
reconstructed on `--reconstruct-samples` samples and cut, as `hywia prune` does, and its perplexity measured. Every
`--search` runs on the same scores, for both layouts; its perplexity is the grid's, as its plan is one of these.
`of_best` is that over the least of the grid that the layout admits. With `--recover-tokens`, every plan of the grid is
then recovered as well, on one text that the dense model writes, `recovered` is its perplexity after that, and searches
judge their two best plans after a short recovery, as those of `hywia prune --recover` do.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hywia_kernels as hk
from hywia_kernels.arch.facts import count_parameters
from hywia_kernels.deploy import planning
from hywia_kernels.evaluation import blocks
from hywia_kernels.method.recovery.job import Dense, ask, resolved
from hywia_kernels.method.search import Choices, best_plan
from hywia_kernels.method.selection import estimated_loss
from hywia_kernels.settings import LAYOUTS, SAMPLES, SEARCHES

from .session import Session, argv_of, at_least, common_arguments, make_parser, parse

MODULE = "benchmarks.bench_search"

# `search` is "grid" for a plan of it; heads and channels are what a layer keeps, the latter in the mean; `estimate` is
# of the scores, divergence of the last search that tried the plan; seconds are those of the search, or of the
# reconstruction and the evaluation of a plan of the grid.
COLUMNS = {
    "model": str,
    "ratio": float,
    "layout": str,
    "search": str,
    "heads": int,
    "channels": float,
    "spread": float,
    "removed": float,
    "estimate": float,
    "divergence": float,
    "perplexity": float,
    "of_best": float,
    "text": str,
    "blocks": int,
    "samples": int,
    "reconstruct_samples": int,
    "seconds": float,
    "layer_passes": int,
    "recover_tokens": int,
    "recovered": float,
    "of_best_recovered": float,
}


class Bench:
    """A model, its ranked scores, and the measured plans of a ratio.

    Args:
        tokens: int64 `[samples, seq_len]`. scored, reconstructed: how many of the first are for either.
        perplexity: of a model. dense: its side of a recovery of the plans; None: there is none.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        scored: int,
        reconstructed: int,
        perplexity: Callable[[Any], float],
        dense: Dense | None = None,
    ) -> None:
        self.model, self.tokens, self.perplexity, self.dense = model, tokens, perplexity, dense
        self.recipe = hk.Recipe(ratio=0.5, samples=scored, reconstruct_samples=reconstructed).resolved(
            next(model.parameters()).device.type, count_parameters(model)
        )
        measured = hk.measure(model, None, self.recipe, tokens=tokens)
        self.scores = hk.rank_heads(measured.scores, hk.head_residuals(model, tokens[:scored]))
        self.measured: dict[tuple[Any, ...], float] = {}
        self.recovered: dict[tuple[Any, ...], float] = {}

    def choices(self, ratio: float, layout: str, align: int | None) -> Choices:
        return planning.choices(self.scores, ratio=ratio, layout=layout, align=align)

    def plan_measured(self, plan: hk.Plan) -> float:
        """Perplexity of a copy of the model, reconstructed and cut; once it is recovered, `recovered` holds that."""
        smaller = copy.deepcopy(self.model)
        text = self.tokens[: self.recipe.reconstruct_samples]
        hk.prune(smaller, hk.reconstruct(smaller, plan, text, passes=self.recipe.layer_passes or 0))
        self.measured[key(plan)] = self.perplexity(smaller)
        if self.dense is not None:
            self.dense.recover(smaller)
            self.recovered[key(plan)] = self.perplexity(smaller)
        return self.measured[key(plan)]

    def searched(self, choices: Choices, effort: str) -> hk.Plan:
        """What `hk.compress` plans from these scores."""
        if effort == "none":
            return choices.plan(choices.splits[0], choices.spreads[-1])
        dense = self.dense
        return best_plan(
            self.model,
            self.scores,
            choices,
            self.tokens,
            effort=effort,
            scored=self.recipe.samples,
            ridge=self.recipe.ridge,
            passes=self.recipe.layer_passes or 0,
            follow=None if dense is None or not dense.brief_steps else lambda masked, _: dense.briefly(masked),
        )


def key(plan: hk.Plan) -> tuple[Any, ...]:
    """What a plan keeps, to find it again."""
    return tuple((name, tuple(kept.tolist())) for name, kept in sorted(plan.keep.items()))


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(MODULE, __doc__)
    common_arguments(parser, seed=False)
    parser.add_argument("--model", default="smollm2", help="as `hywia prune` takes it")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--calib", required=True, help="text or .jsonl file, or a dataset")
    parser.add_argument("--text", type=Path, required=True, help="perplexity on this")
    parser.add_argument("--max-blocks", type=int, help="of the text; default: all")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--search", nargs="+", default=list(SEARCHES[:2]), choices=SEARCHES)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="scored; default: %(default)s")
    parser.add_argument("--reconstruct-samples", type=int, help="default: the recipe's for the device")
    parser.add_argument("--align", type=int, help="default: what the device likes")
    parser.add_argument("--calib-seed", type=int, default=0)
    parser.add_argument(
        "--recover-tokens", type=at_least(1), metavar="N", help="recover every plan of the grid on so many"
    )
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: all")
    return parse(parser, argv)


def run(arguments: argparse.Namespace, model: Any, tokenizer: Any, argv: Sequence[str]) -> int:
    """Measures the grid, then what the searches choose; the exit code."""
    session = Session(arguments, MODULE, argv, COLUMNS)
    text = blocks(tokenizer, arguments.text.read_text(encoding="utf-8"), arguments.block, arguments.max_blocks)
    most = hk.Recipe(
        ratio=0.5,
        search=max(arguments.search, key=SEARCHES.index),
        samples=arguments.samples,
        reconstruct_samples=arguments.reconstruct_samples,
    ).resolved(arguments.device.type)
    tokens = hk.calibration(
        model,
        tokenizer,
        arguments.calib,
        samples=most.text_samples(),
        seq_len=arguments.block,
        seed=arguments.calib_seed,
        fewer=True,
    )
    reconstructed = min(most.reconstruct_samples or 1, len(tokens))
    print(f"dense: {hk.perplexity(model, text, batch=16):.2f}", flush=True)
    with ExitStack() as stack:
        dense = None
        if arguments.recover_tokens:
            request = hk.Recovery(tokens=arguments.recover_tokens)
            request = resolved(request, model, arguments.device, seed=arguments.calib_seed)
            dense = stack.enter_context(ask(model, tokenizer, request))
        bench = Bench(
            model, tokens, arguments.samples, reconstructed, lambda m: hk.perplexity(m, text, batch=16), dense
        )
        measure(arguments, session, bench, len(text))
    return session.finish()


def measure(arguments: argparse.Namespace, session: Session, bench: Bench, count: int) -> None:
    """The rows of the grids and of the searches; `count` blocks of text give a perplexity."""

    def row(plan: hk.Plan, **figures: Any) -> None:
        channels = plan.widths("mlp")
        made = session.add(
            seed=arguments.calib_seed,
            model=str(arguments.model),
            heads=plan.widths("attention")[0],
            channels=sum(channels) / len(channels),
            removed=plan.ratio,
            estimate=estimated_loss(bench.scores, plan),
            perplexity=bench.measured[key(plan)],
            text=arguments.text.name,
            blocks=count,
            samples=arguments.samples,
            reconstruct_samples=bench.recipe.reconstruct_samples,
            layer_passes=bench.recipe.layer_passes or 0,
            recover_tokens=arguments.recover_tokens or 0,
            recovered=bench.recovered.get(key(plan)),
            **figures,
        )
        print(
            f"{made.ratio} {made.layout} {made.search}: {made.heads} heads, {made.channels:.0f} channels, spread "
            f"{made.spread}: {made.perplexity:.2f} ({made.seconds:.0f} s)"
            + ("" if made.of_best is None else f", {made.of_best:.3f} of the best")
            + ("" if made.recovered is None else f"; recovered {made.recovered:.2f}")
            + ("" if made.of_best_recovered is None else f", {made.of_best_recovered:.3f} of the best"),
            flush=True,
        )

    for ratio in arguments.ratios:
        found = []
        tried: dict[tuple[int, float], float] = {}  # heads and spread -> divergence
        for layout in LAYOUTS:
            choices = bench.choices(ratio, layout, arguments.align)
            for effort in arguments.search:
                began = time.monotonic()
                plan = bench.searched(choices, effort)
                found.append((layout, effort, plan, time.monotonic() - began))
                for trial in plan.record.get("search", {}).get("candidates", ()):
                    spread = trial["spread"] if layout == "adaptive" else 0.0
                    tried[trial["widths"]["attention"], spread] = trial["divergence"]
        grid = bench.choices(ratio, "adaptive", arguments.align)
        spreads: dict[tuple[Any, ...], float] = {}
        for split in grid.splits:
            for spread in grid.spreads:
                plan, began = grid.plan(split, spread), time.monotonic()
                if key(plan) in spreads:
                    continue  # a cut so deep that every budget is the same
                spreads[key(plan)] = spread
                bench.plan_measured(plan)
                row(
                    plan,
                    ratio=ratio,
                    layout="adaptive" if spread else "uniform",
                    search="grid",
                    spread=spread,
                    divergence=tried.get((plan.widths("attention")[0], spread)),
                    of_best=None,
                    of_best_recovered=None,
                    seconds=time.monotonic() - began,
                )
        for layout, effort, plan, seconds in found:
            admitted = [k for k, spread in spreads.items() if layout == "adaptive" or not spread]
            of_best = [
                held[key(plan)] / min(held[k] for k in admitted) if held else None
                for held in (bench.measured, bench.recovered)
            ]
            row(
                plan,
                ratio=ratio,
                layout=layout,
                search=effort,
                spread=spreads[key(plan)],
                divergence=plan.record.get("search", {}).get("divergence"),
                of_best=of_best[0],
                of_best_recovered=of_best[1],
                seconds=seconds,
            )


def main(argv: Sequence[str] | None = None) -> int:
    argv = argv_of(argv)
    arguments = _arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = hk.load(arguments.model, dtype=arguments.dtype, device=str(arguments.device))
    return run(arguments, model, tokenizer, argv)


if __name__ == "__main__":
    sys.exit(main())
