"""The papers' table of one model: pruned at 20 and 50 %, recovered, seven tasks, two perplexities, cost and latency.

    python -m benchmarks.paper --model huggyllama/llama-7b --csv benchmarks/paper.csv
    python -m benchmarks.paper --model smollm2 --calib c4.jsonl --text test.txt novel.txt --tasks DIR
    python -m benchmarks.paper --random 7b --recover none self --recover-tokens 10000000

Protocols (`--protocols`): papers20 and papers50 are LLM-Pruner's and HyWIA's: a quarter of heads and channels in layers
4 to 29 of 32, 60 % of them in layers 3 to 30 (the same parts of another depth), which is 20 and 50 % of LLaMA-7B;
ratio20 and ratio50 remove that share of all parameters as `hywia prune --ratio` does. Criteria and recoveries are those
of `benchmarks.quality`. Tasks go through lm-eval: its own from the hub, or with `--tasks` the files of a directory in
its format; `--harness own` scores those by `benchmarks/tasks.py`. Perplexities are of blocks of 128 and 2,048 tokens
of WikiText-2 and Penn Treebank, or of two files. `macs` are of 64 tokens, as the papers count them; memory of pruning
and recovery includes the dense model, memory of inference does not.

With `--random` the model has the shape's random weights, and reads and is recovered on random tokens: times and memory
are those of a real one, and all columns of quality stay empty. The time of writing the recovery's text is not in it.

The rows of `published.csv` are printed beside those measured, each with where it was read.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hywia_kernels as hk
from hywia_kernels.deploy.cost import cost_of
from hywia_kernels.deploy.speed import MODES
from hywia_kernels.settings import SEQ_LEN

from . import costs, lm_eval_tasks, models, paper_table, published, tasks, texts
from .cuts import Bench, shape, split
from .memory import free
from .quality import model_arguments, recoveries_of
from .recoveries import COLUMNS as RECOVERY
from .recoveries import Recoveries
from .session import Session, argv_of, at_least, common_arguments, make_parser, parse
from .settings import Setting

MODULE = "benchmarks.paper"
_NEVER = 1_000_000  # checks without a lower divergence: more than a run has
# `layers` is A:B or "all"; seconds and peak bytes of everything from scores to cut, then of the recovery; a share, a
# mean and standard errors as in `quality`; perplexities of both texts at 128 and 2,048 tokens.
COLUMNS = {
    **dict.fromkeys(("model", "weights", "dtype", "criterion"), str),
    "samples": int,
    **dict.fromkeys(("protocol", "layers"), str),
    "removed": float,
    "parameters": int,
    "kv_groups": float,
    "channels": float,
    "prune_seconds": float,
    "prune_peak_bytes": int,
    **RECOVERY,
    "recovery_peak_bytes": int,
    "macs": int,
    "context": int,
    "mode": str,
    "prefill_ms": float,
    "decode_ms": float,
    "inference_peak_bytes": int,
    **dict.fromkeys(("text", "second_text"), str),
    **dict.fromkeys((f"{which}_{block}" for which in ("text", "second_text") for block in texts.BLOCKS), float),
    "harness": str,
    "questions": int,
    **tasks.PERCENTS,
    **tasks.ERRORS,
}


@dataclass(frozen=True)
class Protocol:
    """How much goes: of all parameters (`ratio`), or the papers' share of units, with this many of 32 layers left whole
    at the beginning and at the end."""

    ratio: float | None = None
    share: float | None = None
    whole: tuple[int, int] = (0, 0)

    def setting(self, model: Any) -> Setting:
        """For a model of any depth; kinds of which no whole unit would go are left out."""
        if self.ratio is not None:
            return Setting(ratio=self.ratio)
        groups = hk.groups(model)
        depth = 1 + max(g.layer for g in groups)
        first, last = (round(n * depth / 32) for n in self.whole)
        share = self.share or 0.0
        shares = {g.kind: share for g in groups if g.kind in ("mlp", "attention") and round(share * g.units)}
        return Setting(shares, layers=range(first, depth - last))


PROTOCOLS = {
    "papers20": Protocol(share=0.25, whole=(4, 2)),
    "papers50": Protocol(share=0.6, whole=(3, 1)),
    "ratio20": Protocol(ratio=0.2),
    "ratio50": Protocol(ratio=0.5),
}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(MODULE, __doc__)
    common_arguments(parser)
    parser.set_defaults(seed=0)
    model_arguments(parser, "smollm2")
    parser.add_argument("--random", choices=tuple(models.SHAPES), metavar="SHAPE", help="random weights instead")
    parser.add_argument("--depth", type=at_least(1), metavar="N", help="the first N layers of a random shape")
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=tuple(PROTOCOLS))
    parser.add_argument("--criteria", nargs="+", default=["recipe"], metavar="CRITERION", help="see benchmarks.quality")
    parser.add_argument("--calib", help="text or .jsonl file, or a dataset; default: the model writes the text")
    parser.add_argument("--text", type=Path, nargs=2, metavar=("FILE", "FILE"), help="instead of the papers' two texts")
    parser.add_argument("--harness", choices=("lm-eval", "own"), default="lm-eval", help="default: %(default)s")
    parser.add_argument("--align", type=at_least(1), help="channel widths are multiples of it; default: the target's")
    parser.add_argument("--context", type=at_least(2), default=512, help="tokens of the latencies")
    parser.add_argument("--mode", choices=MODES, help="of the latencies; default: static on a GPU, else captured")
    parser.add_argument("--runs", type=at_least(2), default=20, help="readings per latency")
    given = parse(parser, argv)
    given.mode = given.mode or ("static" if given.device.type == "cuda" else "captured")
    try:
        given.criteria = [split(name) for name in given.criteria]
    except ValueError as error:
        parser.error(f"--criteria: {error}")
    if given.harness == "own" and given.tasks is None and given.random is None:
        parser.error("--harness: own needs --tasks DIR")
    if given.harness == "lm-eval" and given.random is None and not lm_eval_tasks.available():
        parser.error("--harness: lm-eval needs the package lm_eval: pip install lm_eval; or --harness own --tasks DIR")
    return given


class Table:
    """Measures models, one row each.

    Args:
        told: name -> text; none for random weights, whose quality is not asked.
    """

    def __init__(self, arguments: argparse.Namespace, session: Session, tokenizer: Any, told: dict[str, str]) -> None:
        self.arguments, self.session, self.tokenizer = arguments, session, tokenizer
        self.cuts = {
            name: texts.cut(tokenizer, text, texts.BLOCKS, arguments.max_blocks) for name, text in told.items()
        }
        own = arguments.harness == "own" and bool(told)
        self._tasks = tasks.read(arguments.tasks, tokenizer, arguments.questions) if own else []

    def add(self, model: Any, **figures: Any) -> None:
        given = self.arguments
        cost = cost_of(model)
        times, reason = costs.latency(model, given.context, given.mode, given.runs)
        if reason is not None:
            print(f"no latency: {reason}")
        row = {
            **dict.fromkeys(COLUMNS),
            "model": given.random or str(given.model),
            "weights": "random" if given.random else "pretrained",
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "parameters": cost.parameters,
            "macs": costs.macs(cost),
            **figures,
            **times,
            **(self._quality(model) if self.cuts else {"divergence": None}),
        }
        made = self.session.add(**row)
        spent = (made.prune_seconds or 0.0) + (made.recovery_seconds or 0.0)
        shown = ", ".join(
            f"{name} {value:.2f}" for name, value in made.figures.items() if _is_quality(name) and value is not None
        )
        print(f"{paper_table.label(made)}: {shown or 'quality not measured'} ({spent:.1f} s)", flush=True)

    def _quality(self, model: Any) -> dict[str, Any]:
        given = self.arguments
        found: dict[str, Any] = {}
        for which, (name, blocks) in zip(("text", "second_text"), self.cuts.items(), strict=True):
            values = texts.perplexities(model, blocks, given.batch)
            found |= {which: name, **{f"{which}_{block}": value for block, value in values.items()}}
        if given.harness == "own":
            scores = tasks.evaluate(model, self._tasks)
        else:
            scores = lm_eval_tasks.evaluate(model, self.tokenizer, given.tasks, limit=given.questions)
        harness = "benchmarks.tasks" if given.harness == "own" else f"lm_eval {lm_eval_tasks.version()}"
        return {**found, "harness": harness, "questions": given.questions, **scores}


def _is_quality(name: str) -> bool:
    return name == "mean" or (name.startswith(("text_", "second_text_")) and name.rpartition("_")[2].isdigit())


def run(arguments: argparse.Namespace, model: Any, tokenizer: Any, argv: Sequence[str]) -> Session:
    """Measures the dense model and what was asked for, and prints a line each, then the table."""
    session = Session(arguments, MODULE, argv, COLUMNS)
    told = {} if arguments.random else texts.read(arguments.text)
    recoveries = _recoveries(arguments, model, tokenizer)
    table = Table(arguments, session, tokenizer, told)
    bench = _bench(arguments, model, tokenizer)
    table.add(model, criterion="dense", samples=0, protocol="dense", layers="", removed=0.0)
    for name, count in arguments.criteria:
        for protocol in arguments.protocols:
            for made, figures in _made(bench, recoveries, name, count, protocol, arguments.seed):
                table.add(made, **figures)
            free(arguments.device)
    rows = published.of_model(str(arguments.model), published.read())
    print("\n" + paper_table.render(session.rows, rows, list(told)))
    if arguments.random:
        print("\nRandom weights: time and memory alone were measured, no perplexity and no task.")
    return session


def _made(
    bench: Bench, recoveries: Recoveries, name: str, count: int, protocol: str, seed: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A cut model after each recovery, with its figures."""
    wanted = PROTOCOLS[protocol].setting(bench.model)
    span = "all" if wanted.layers is None else f"{wanted.layers.start}:{wanted.layers.stop}"
    with bench.pruned(name, count, wanted, seed) as cut:
        figures = {"criterion": name, "samples": count, "protocol": protocol, "layers": span, "removed": cut.plan.ratio}
        figures |= {**shape(cut.plan), "prune_seconds": cut.spent.seconds, "prune_peak_bytes": cut.spent.peak_bytes}
        for recovered in recoveries.each(cut.model, seed):
            yield recovered.model, {**figures, **recovered.figures, "recovery_peak_bytes": recovered.peak_bytes}


def _bench(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> Bench:
    """The samples that the recipe reads on this device, drawn once a seed, or random ones."""
    drawn: dict[tuple[int, int], Tensor] = {}

    def samples(seed: int, count: int) -> Tensor:
        if (seed, count) not in drawn:
            if tokenizer is None:
                drawn[seed, count] = models.token_ids(model, count, SEQ_LEN, torch.device("cpu"))
            else:
                source = arguments.calib
                drawn[seed, count] = hk.calibration(model, tokenizer, source, samples=count, seed=seed, fewer=True)
        return drawn[seed, count]

    most = hk.Recipe(ratio=0.5).resolved(arguments.device.type).text_samples()
    return Bench(model, samples, range(0), arguments.align, text=most)


def _recoveries(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> Recoveries:
    if not arguments.random:
        return recoveries_of(arguments, model, tokenizer)

    def written(request: hk.Recovery) -> Tensor:
        samples = math.ceil((request.text_tokens or 0) / request.seq_len) + request.held_out
        return models.token_ids(model, samples, request.seq_len, torch.device("cpu"))

    # Random tokens teach nothing, and training would end for it: it goes on to the end, since its time is asked.
    return recoveries_of(arguments, model, tokenizer, written, patience=_NEVER)


def main(argv: Sequence[str] | None = None) -> int:
    argv = argv_of(argv)
    arguments = _arguments(argv)
    torch.backends.cuda.matmul.allow_tf32 = not arguments.exact
    if arguments.random:
        dtype = arguments.dtype
        if dtype == "auto":
            dtype = "bfloat16" if arguments.device.type == "cuda" else "float32"
        torch.manual_seed(arguments.seed)
        model, tokenizer = models.build(arguments.random, arguments.depth, dtype, arguments.device), None
    else:
        model, tokenizer = hk.load(arguments.model, dtype=arguments.dtype, device=str(arguments.device))
    return run(arguments, model, tokenizer, argv).finish()


if __name__ == "__main__":
    sys.exit(main())
