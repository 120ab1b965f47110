"""What pruning leaves of a model: perplexity and zero-shot tasks, by criterion, setting and calibration seed.

    python -m benchmarks.quality --calib c4.jsonl --text test.txt                   # SmolLM2, every criterion
    python -m benchmarks.quality --calib c4.jsonl --text test.txt --tasks DIR --settings A50 --only recipe flap
    python -m benchmarks.quality --calib c4.jsonl --text valid.txt --max-blocks 64 --figure quality.html

The protocol: samples of 128 tokens from the calibration text, a seed each; some units of layers 4 to 27 (`--layers`)
go; the whole text is tokenised and cut into blocks of 128 tokens. Settings: A25, A50: that share of the MLP's channels;
B25, B60: the same, and a third of the KV groups (one of three). This package's criteria go through
`hywia_kernels.compress`, which cuts a copy of the model; the others mask the units of a copy, which gives the same
logits. Criteria, `name[@samples]`:

    random, magnitude                                       of this package; need no data
    lp:vectorize, lp:param_first, lp:param_second, lp:param_mix    LLM-Pruner; 10 samples unless told
    wanda-sp, flap                                          see `peers`; 128 and 1024 samples
    fine, coarse, attention, product, mean                  this package's fusions, second order, nothing else
                                                            of the recipe; 10 samples
    fine:first, coarse:first, ...                           the same of another order
    recipe                                                  what `hywia prune` does: attention's scores, heads by
                                                            residual, adaptive layout, reconstruction
    recipe-uniform                                          the recipe with uniform layers
    recipe-unrefitted                                       recipe-uniform without reconstruction, heads by score
    learned                                                 recipe-unrefitted with masks learned for 50 steps

On CUDA, products are TF32 (`--exact`: float32). Choose on one text and report on another.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hywia_kernels as hk
from hywia_kernels.cli import charts
from hywia_kernels.evaluation import blocks
from hywia_kernels.settings import FUSIONS, SAMPLES

from . import peers, tasks
from .rows import Row
from .session import Session, argv_of, common_arguments, make_parser, parse

MODULE = "benchmarks.quality"
SETTINGS: dict[str, peers.Shares] = {
    "A25": {"mlp": 0.25},
    "A50": {"mlp": 0.5},
    "B25": {"mlp": 0.25, "attention": 1 / 3},
    "B60": {"mlp": 0.6, "attention": 1 / 3},
}
# Criterion -> the fields of a recipe with these settings that differ from the defaults.
RECIPES: dict[str, dict[str, Any]] = {
    "recipe": {},
    "recipe-uniform": {"layout": "uniform"},
    "recipe-unrefitted": {"layout": "uniform", "reconstruct": False},
    "learned": {"layout": "uniform", "reconstruct": False, "fusion": "learned"},
}
ALONE = {"layout": "uniform", "reconstruct": False}  # a grain, a blend or a baseline without the rest of the recipe
ALL = (
    "random",
    "magnitude",
    *(f"lp:{t}" for t in peers.LLM_PRUNER),
    "wanda-sp",
    "flap",
    "fine",
    "coarse",
    "attention",
    *RECIPES,
)
DEFAULT_SAMPLES = {"wanda-sp": 128, "flap": 1024, **dict.fromkeys(RECIPES, SAMPLES)}
TEXT = 1024  # samples that are always drawn, as many as a GPU's reconstruction reads; scoring takes the first of them


# `removed` is a share of all parameters, `seconds` of everything but the evaluation, `mean` of the tasks.
COLUMNS = {
    "model": str,
    "criterion": str,
    "samples": int,
    "setting": str,
    "layers": str,
    "removed": float,
    "perplexity": float,
    "text": str,
    "blocks": int,
    "seconds": float,
    **dict.fromkeys((*tasks.NAMES, "mean"), float),
}


class Bench:
    """A model, its calibration samples `(seed, count)` -> int64 `[count, length]`, and its measurements, which criteria
    of the same seed and number of samples share."""

    def __init__(self, model: Any, samples: Callable[[int, int], Tensor], layers: range, align: int = 1) -> None:
        self.model, self.samples, self.layers, self.align = model, samples, layers, align
        self._measured: dict[tuple[int, int], hk.Measured] = {}

    def measured(self, seed: int, count: int) -> hk.Measured:
        key = (seed, count)
        if key not in self._measured:
            tokens = self.samples(seed, max(count, TEXT))
            self._measured[key] = hk.measure(self.model, None, hk.Recipe(samples=count, seed=seed), tokens=tokens)
        return self._measured[key]

    def statistics(self, seed: int, count: int) -> hk.Statistics:
        statistics = self.measured(seed, count).statistics
        assert statistics is not None
        return statistics

    def recipe(self, criterion: str, count: int, shares: peers.Shares, seed: int) -> hk.Recipe:
        """The recipe of one of this package's criteria."""
        name, _, order = criterion.partition(":")
        if name in ("random", "magnitude"):
            change: dict[str, Any] = {**ALONE, "criterion": name}
        elif name in RECIPES:
            change = RECIPES[name]
        else:
            change = {**ALONE, "fusion": name, "order": order or "second"}
        layers = (self.layers.start, self.layers.stop)
        return hk.Recipe(group_ratio=dict(shares), layers=layers, align=self.align, samples=count, seed=seed, **change)

    @contextmanager
    def pruned(self, criterion: str, count: int, shares: peers.Shares, seed: int) -> Iterator[tuple[Any, hk.Plan]]:
        """A copy of the model as the criterion leaves it, and the plan. For other methods the copy is masked, not
        cut."""
        model = copy.deepcopy(self.model)
        if criterion in ("wanda-sp", "flap") or criterion.startswith("lp:"):
            plan, biases = self._peer(model, criterion, count, shares, seed)
            with peers.biased(model, biases):
                yield model, plan
            return
        recipe = self.recipe(criterion, count, shares, seed)
        measured = self.measured(seed, count) if recipe.criterion == "hywia" else None
        yield model, hk.compress(model, None, recipe, measured=measured).plan

    def _peer(
        self, model: Any, criterion: str, count: int, shares: peers.Shares, seed: int
    ) -> tuple[hk.Plan, dict[str, Tensor]]:
        if criterion == "wanda-sp":
            return peers.wanda_sp(model, self.samples(seed, count), shares, self.layers), {}
        if criterion == "flap":
            result = peers.flap(model, self.samples(seed, count), shares, self.layers)
            plan, biases = result.plan, result.biases
        else:
            scores = peers.llm_pruner(self.statistics(seed, count), criterion.partition(":")[2])
            layers = (self.layers.start, self.layers.stop)
            plan, biases = hk.plan(scores, group_ratio=shares, layers=layers, align=self.align), {}
        hk.mask(model, plan)
        return plan, biases


def split(criterion: str) -> tuple[str, int]:
    """`name[@samples]` with the name's usual number of samples.

    Raises:
        ValueError: an unknown criterion.
    """
    name, at, count = criterion.partition("@")
    base, colon, order = name.partition(":")
    known = (base == "lp" and order in peers.LLM_PRUNER) or (
        base in FUSIONS and (not colon or order in ("first", "second", "mixed"))
    )
    if not known and name not in ALL:
        raise ValueError(f"expected criteria out of {', '.join(ALL)}, got {name!r}")
    return name, int(count) if at else DEFAULT_SAMPLES.get(name, 10)


def removed_shares(bench: Bench, statistics: hk.Statistics, share: float) -> dict[str, list[float]]:
    """Fusion -> share of each layer's channels that it removes when all layers are ranked together.

    A single grain ranks the layers by its own second-order estimate of the loss, the hybrid ranks them as `plan` does.
    """
    removed = {}
    for name in ("fine", "coarse", "attention"):
        scores = hk.fuse(statistics, name)
        if name != "attention":
            scores = replace(scores, loss=scores.values)
        plan = hk.plan(scores, group_ratio={"mlp": share}, align=bench.align, layout="adaptive")
        groups = [g for g in plan.groups if g.kind == "mlp"]
        removed["hybrid" if name == "attention" else name] = [1.0 - plan.keep[g.name].numel() / g.units for g in groups]
    return removed


def figure(bench: Bench, text: Tensor, seed: int, criteria: Sequence[str], batch: int) -> str:
    """An HTML page: shares removed in each layer, and perplexity against the share of channels removed."""
    shares = removed_shares(bench, bench.statistics(seed, SAMPLES), 0.5)
    labels = [str(i) for i in range(len(next(iter(shares.values()))))]
    page = charts.bars(
        "Channels removed in each layer, half of all by one ranking", labels, shares, x_label="layer", y_label="share"
    )
    curves: dict[str, list[tuple[float, float]]] = {}
    for criterion in criteria:
        name, count = split(criterion)
        for share in (0.125, 0.25, 0.375, 0.5, 0.625):
            with bench.pruned(name, count, {"mlp": share}, seed) as (model, _):
                value = math.log10(hk.perplexity(model, text, batch=batch))
            curves.setdefault(criterion, []).append((share, value))
    page += charts.lines(
        "Perplexity", curves, x_label="share of channels removed", y_label="log10 perplexity", zero=False
    )
    return f"<!doctype html><meta charset=utf-8><title>Quality of pruned models</title>{page}"


def table(rows: Sequence[Row]) -> str:
    """Perplexity as a Markdown table, criterion by setting: geometric means over seeds, and over all settings."""
    settings = list(dict.fromkeys(r.setting for r in rows))
    lines = ["| criterion | " + " | ".join(settings) + " | all | tasks |", "| --- " * (len(settings) + 3) + "|"]
    for name in dict.fromkeys((r.criterion, r.samples) for r in rows):
        mine = [r for r in rows if (r.criterion, r.samples) == name]
        cells = []
        for setting in settings:
            logs = [math.log(r.perplexity) for r in mine if r.setting == setting]
            cells.append(math.exp(sum(logs) / len(logs)) if logs else float("nan"))
        means = [r.mean for r in mine if r.mean is not None]
        overall = math.exp(sum(map(math.log, cells)) / len(cells))
        shown = " | ".join(f"{c:.4g}" for c in (*cells, overall))
        lines.append(f"| {name[0]}@{name[1]} | {shown} | {f'{sum(means) / len(means):.2f}' if means else ''} |")
    return "\n".join(lines)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(MODULE, __doc__)
    common_arguments(parser, seed=False)
    parser.add_argument("--model", default="smollm2", help="as `hywia prune` takes it")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--calib", required=True, help="text or .jsonl file, or a dataset")
    parser.add_argument("--text", type=Path, required=True, help="perplexity on this")
    parser.add_argument("--max-blocks", type=int, help="of the text; default: all")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--tasks", type=Path, metavar="DIR", help="zero-shot tasks, see benchmarks/tasks.py")
    parser.add_argument("--questions", type=int, help="of each task; default: all")
    parser.add_argument("--lm-eval", action="store_true", help="the same tasks through lm-eval and the hub")
    parser.add_argument("--only", nargs="+", default=list(ALL), metavar="CRITERION")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", default="4:28", metavar="A:B")
    parser.add_argument("--align", type=int, default=16, help="channel widths are multiples of this")
    parser.add_argument("--batch", type=int, default=64, help="blocks at a time")
    parser.add_argument("--exact", action="store_true", help="float32 products on CUDA, not TF32")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write shares by layer and curves as an HTML page")
    arguments = parse(parser, argv)
    try:
        arguments.criteria = [split(name) for name in arguments.only]
    except ValueError as error:
        parser.error(f"--only: {error}")
    first, _, end = arguments.layers.partition(":")
    arguments.range = range(int(first), int(end))
    return arguments


def run(arguments: argparse.Namespace, model: Any, tokenizer: Any, argv: Sequence[str]) -> list[Row]:
    """Measures and prints the dense model and all that was asked for, then the table; returns the rows of the
    latter."""
    session = Session(arguments, MODULE, argv, COLUMNS)
    text = blocks(tokenizer, arguments.text.read_text(encoding="utf-8"), arguments.block, arguments.max_blocks)
    questions = tasks.read(arguments.tasks, tokenizer, arguments.questions) if arguments.tasks else []
    drawn: dict[tuple[int, int], Tensor] = {}

    def samples(seed: int, count: int) -> Tensor:
        if (seed, count) not in drawn:
            drawn[seed, count] = hk.calibration(
                model, tokenizer, arguments.calib, samples=count, seq_len=arguments.block, seed=seed, fewer=True
            )
        return drawn[seed, count]

    bench = Bench(model, samples, arguments.range, arguments.align)

    def measure(made: Any, criterion: str, count: int, setting: str, seed: int, removed: float, seconds: float) -> None:
        scores: dict[str, float] = tasks.evaluate(made, questions) if questions else {}
        if arguments.lm_eval:
            scores = tasks.through_lm_eval(made, tokenizer)
        row = session.add(
            seed=seed,
            model=str(arguments.model),
            criterion=criterion,
            samples=count,
            setting=setting,
            layers=arguments.layers,
            removed=removed,
            perplexity=hk.perplexity(made, text, batch=arguments.batch),
            text=arguments.text.name,
            blocks=len(text),
            seconds=seconds,
            **{name: scores.get(name) for name in (*tasks.NAMES, "mean")},
        )
        shown = "" if row.mean is None else f", tasks {row.mean:.2f}"
        print(f"{criterion}@{count} {setting} seed {seed}: {row.perplexity:.2f}{shown} ({seconds:.1f} s)", flush=True)

    measure(model, "dense", 0, arguments.settings[0], 0, 0.0, 0.0)
    for seed in arguments.seeds:
        for name, count in arguments.criteria:
            for setting in arguments.settings:
                began = time.monotonic()
                with bench.pruned(name, count, SETTINGS[setting], seed) as (smaller, plan):
                    measure(smaller, name, count, setting, seed, plan.ratio, time.monotonic() - began)
    dense, *rows = session.rows
    print(f"\ndense: {dense.perplexity:.2f}\n{table(rows)}")
    if arguments.figure:
        wanted = [f"{name}@{count}" for name, count in arguments.criteria]
        arguments.figure.write_text(figure(bench, text, arguments.seeds[0], wanted, arguments.batch))
    session.finish()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    argv = argv_of(argv)
    arguments = _arguments(argv)
    model, tokenizer = hk.load(arguments.model, dtype=arguments.dtype, device=str(arguments.device))
    torch.backends.cuda.matmul.allow_tf32 = not arguments.exact
    run(arguments, model, tokenizer, argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
