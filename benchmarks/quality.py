"""What pruning leaves of a model: perplexity and zero-shot tasks, by criterion, setting, recovery and calibration seed.

    python -m benchmarks.quality --calib c4.jsonl --text test.txt                   # SmolLM2, every criterion
    python -m benchmarks.quality --calib c4.jsonl --text test.txt --tasks DIR --settings A50 --only recipe flap
    python -m benchmarks.quality --calib c4.jsonl --text test.txt novel.txt --settings P50 --recover none self
    python -m benchmarks.quality --calib c4.jsonl --text test.txt --settings P50 --split 1 2 3 --only recipe-adaptive
    python -m benchmarks.quality --calib c4.jsonl --text test.txt --block 128 2048 --settings P50 --only recipe flap
    python -m benchmarks.quality --calib c4.jsonl --text valid.txt --max-blocks 64 --figure quality.html

The protocol: samples of 128 tokens from the calibration text, a seed each; some units go; each text is tokenised whole
and cut into blocks of 128 tokens, and gives a row. `--block` names another length, or several, a row each: samples have
the first one's tokens, and `--max-blocks` and `--batch` count its blocks. Settings: A25, A50: that share of the MLP's
channels in layers 4 to 27 (`--layers`); B25, B60: the same, and a third of the KV groups (one of three). P30, P50: that
share of all parameters, heads and channels of every layer; other methods then keep as many of both as this package's
`recipe` does with the same seed, and random and magnitude, which have no estimate of the loss, the same share of both
kinds. `--split G` has every criterion keep G KV groups and the channels that then come nearest to the share (`P50:G`).
Every model is a copy that is really cut. Criteria, `name[@samples]`:

    random, magnitude                                       of this package; need no data
    lp:vectorize, lp:param_first, lp:param_second, lp:param_mix    LLM-Pruner; 10 samples unless told
    wanda-sp, flap                                          see `peers`; 128 and 1024 samples
    fine, coarse, attention, product, mean                  this package's fusions, second order, nothing else
                                                            of the recipe; 10 samples
    fine:first, coarse:first, ...                           the same of another order
    recipe                                                  what `hywia prune` does: the fine grain's scores, heads by
                                                            residual, reconstruction; layers adaptive but in P settings
    recipe-attention, recipe-coarse, recipe-mean, recipe-product, recipe-learned    the same with another fusion
    recipe-uniform, recipe-adaptive                         the recipe with uniform, with adaptive layers
    recipe-unrefitted                                       recipe-uniform without reconstruction, heads by score
    learned                                                 recipe-unrefitted with masks learned for 50 steps

Recoveries (`--recover`, see `recoveries`): none, lp-own (LLM-Pruner's, needs --alpaca), or sources of text for this
package's. On CUDA, products are TF32 (`--exact`: float32). Choose on one text and report on another.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hywia_kernels as hk
from hywia_kernels.method.tokens import check_length
from hywia_kernels.settings import BLOCK, TUNES

from . import alpaca, lm_eval_tasks, tasks, texts
from .curves import figure
from .cuts import ALL, Bench, shape, split
from .recoveries import COLUMNS as RECOVERY
from .recoveries import NONE, Recoveries
from .rows import Row
from .session import Session, argv_of, at_least, common_arguments, make_parser, parse
from .settings import SETTINGS, expanded, setting

MODULE = "benchmarks.quality"
# `removed` is a share of all parameters, `seconds` of everything before the recovery but text and evaluation (scoring
# counts for every criterion that it serves), `mean` of the tasks; `kv_groups` and `channels` are those that stay, on
# average over all layers; `..._se` are standard errors over questions. A row a text and length of a block, each with
# all other figures.
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
    **tasks.PERCENTS,
    "kv_groups": float,
    "channels": float,
    **RECOVERY,
    **tasks.ERRORS,
    "block": int,
}


def label(row: Row) -> str:
    """What a table calls a row's model: its criterion, and its recovery where it had one."""
    recovery = row.figures.get("recovery") or NONE
    return f"{row.criterion}@{row.samples}" + (f" + {recovery}" if recovery != NONE else "")


def table(rows: Sequence[Row]) -> str:
    """Perplexity as a Markdown table a text and length of its blocks, criterion by setting: geometric means over seeds,
    and over all settings. Tasks are means over rows, with the mean of their standard errors."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(_read(row), []).append(row)
    return "\n\n".join(f"{text}\n\n{_of_text(own)}" if text else _of_text(own) for text, own in parts.items())


def _read(row: Row) -> str:
    """The text of a row's perplexity, and in blocks of how many tokens."""
    text, block = row.figures.get("text", ""), row.figures.get("block")
    return f"{text}, blocks of {block:,}" if block else text


def _of_text(rows: Sequence[Row]) -> str:
    settings = list(dict.fromkeys(r.setting for r in rows))
    lines = ["| criterion | " + " | ".join(settings) + " | all | tasks |", "| --- " * (len(settings) + 3) + "|"]
    for name in dict.fromkeys(map(label, rows)):
        mine = [r for r in rows if label(r) == name]
        cells = []
        for wanted in settings:
            logs = [math.log(r.perplexity) for r in mine if r.setting == wanted]
            cells.append(math.exp(sum(logs) / len(logs)) if logs else float("nan"))
        overall = math.exp(sum(map(math.log, cells)) / len(cells))
        shown = " | ".join(f"{c:.4g}" for c in (*cells, overall))
        means = [r.mean for r in mine if r.mean is not None]
        errors = [r.figures["mean_se"] for r in mine if r.figures.get("mean_se") is not None]
        told = f"{sum(means) / len(means):.2f}" if means else ""
        if errors:
            told += f" ± {sum(errors) / len(errors):.2f}"
        lines.append(f"| {name} | {shown} | {told} |")
    return "\n".join(lines)


def model_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    """What `quality` and `paper` take alike: the model, its texts and tasks, the criteria and the recoveries."""
    parser.add_argument("--model", default=model, help="as `hywia prune` takes it; default: %(default)s")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-blocks", type=at_least(1), help="of each text, of the first length; default: all")
    parser.add_argument("--tasks", type=Path, metavar="DIR", help="zero-shot tasks, see benchmarks/tasks.py")
    parser.add_argument("--questions", type=at_least(1), help="of each task; default: all")
    parser.add_argument("--batch", type=at_least(1), default=64, help="blocks at a time, of the first length")
    parser.add_argument("--exact", action="store_true", help="float32 products on CUDA, not TF32")
    parser.add_argument("--recover", nargs="+", default=[NONE], metavar="HOW", help="see above; default: none")
    parser.add_argument(
        "--recover-tokens", type=at_least(1), metavar="N", help="that this package's recovery trains on"
    )
    parser.add_argument("--tune", choices=TUNES, help="what it trains")
    parser.add_argument("--alpaca", type=Path, metavar="FILE", help="Alpaca's rows as JSON, for lp-own")


def recoveries_of(
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    written: Callable[[hk.Recovery], Tensor] | None = None,
    **settings: Any,
) -> Recoveries:
    """What `--recover` and its companions ask for; `settings` are of the package's request beside theirs, `written` as
    `Recoveries` takes it."""
    request = hk.Recovery(tokens=arguments.recover_tokens, tune=arguments.tune, **settings)
    rows = alpaca.read(arguments.alpaca) if arguments.alpaca else ()
    return Recoveries(model, tokenizer, arguments.recover, request, rows=rows, written=written)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(MODULE, __doc__)
    common_arguments(parser, seed=False)
    model_arguments(parser, "smollm2")
    parser.add_argument("--calib", required=True, help="text or .jsonl file, or a dataset")
    parser.add_argument("--text", type=Path, nargs="+", action="extend", required=True, help="perplexity on these")
    parser.add_argument(
        "--block", type=at_least(2), nargs="+", default=[BLOCK], metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--lm-eval", action="store_true", help="tasks through lm-eval: those of --tasks, or the hub's")
    parser.add_argument("--only", nargs="+", default=list(ALL), metavar="CRITERION")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--split", type=at_least(1), nargs="+", metavar="G", help="KV groups that P settings keep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", default="4:28", metavar="A:B")
    parser.add_argument("--align", type=int, default=16, help="channel widths are multiples of this")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write shares by layer and curves as an HTML page")
    arguments = parse(parser, argv)
    try:
        arguments.criteria = [split(name) for name in arguments.only]
    except ValueError as error:
        parser.error(f"--only: {error}")
    try:
        arguments.settings = expanded(arguments.settings, arguments.split)
    except ValueError as error:
        parser.error(f"--settings: {error}")
    first, _, end = arguments.layers.partition(":")
    arguments.range = range(int(first), int(end))
    return arguments


def run(arguments: argparse.Namespace, model: Any, tokenizer: Any, argv: Sequence[str]) -> list[Row]:
    """Measures and prints the dense model and all that was asked for, then the tables; returns the rows of the
    latter."""
    session = Session(arguments, MODULE, argv, COLUMNS)
    for length in arguments.block:
        check_length(model, length, "block")
    cuts = {
        path.name: texts.cut(tokenizer, path.read_text(encoding="utf-8"), arguments.block, arguments.max_blocks)
        for path in arguments.text
    }
    questions = tasks.read(arguments.tasks, tokenizer, arguments.questions) if arguments.tasks else []
    recoveries = recoveries_of(arguments, model, tokenizer)
    drawn: dict[tuple[int, int], Tensor] = {}

    def samples(seed: int, count: int) -> Tensor:
        if (seed, count) not in drawn:
            drawn[seed, count] = hk.calibration(
                model, tokenizer, arguments.calib, samples=count, seq_len=arguments.block[0], seed=seed, fewer=True
            )
        return drawn[seed, count]

    bench = Bench(model, samples, arguments.range, arguments.align)

    def measure(made: Any, seed: int, **figures: Any) -> None:
        scores: dict[str, float] = {}
        if arguments.lm_eval:
            scores = lm_eval_tasks.evaluate(made, tokenizer, arguments.tasks, limit=arguments.questions)
        elif questions:
            scores = tasks.evaluate(made, questions)
        told = {**dict.fromkeys(COLUMNS), "model": str(arguments.model), **figures, **scores}
        for name, cut in cuts.items():
            for block, value in texts.perplexities(made, cut, arguments.batch).items():
                own = {"perplexity": value, "text": name, "blocks": len(cut[block]), "block": block}
                row = session.add(seed=seed, **{**told, **own})
                shown = "" if row.mean is None else f", tasks {row.mean:.2f}"
                shown += "" if row.divergence is None else f", divergence {row.divergence:.4f}"
                shown += f" ({row.seconds + (row.recovery_seconds or 0.0):.1f} s)"
                print(f"{label(row)} {row.setting} seed {seed}, {_read(row)}: {value:.2f}{shown}", flush=True)

    none = {"criterion": "dense", "samples": 0, "setting": arguments.settings[0], "layers": arguments.layers}
    measure(model, 0, **none, removed=0.0, seconds=0.0)
    for seed in arguments.seeds:
        for name, count in arguments.criteria:
            for wanted in arguments.settings:
                layers = arguments.layers if setting(wanted).shares is not None else "all"
                with bench.pruned(name, count, setting(wanted), seed) as cut:
                    figures = {"criterion": name, "samples": count, "setting": wanted, "layers": layers}
                    figures |= {"removed": cut.plan.ratio, "seconds": cut.spent.seconds, **shape(cut.plan)}
                    for recovered in recoveries.each(cut.model, seed):
                        measure(recovered.model, seed, **figures, **recovered.figures)
    measured = len(cuts) * len(arguments.block)
    dense, rows = session.rows[:measured], session.rows[measured:]
    print("\ndense: " + "; ".join(f"{_read(r)}: {r.perplexity:.2f}" for r in dense) + f"\n\n{table(rows)}")
    if arguments.figure:
        wanted_criteria = [f"{name}@{count}" for name, count in arguments.criteria]
        text = next(iter(cuts.values()))[arguments.block[0]]
        arguments.figure.write_text(figure(bench, text, arguments.seeds[0], wanted_criteria, arguments.batch))
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
