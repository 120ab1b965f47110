"""How long the recipe of `hywia prune` takes on a whole model, step by step, and in how much memory.

    python -m benchmarks.bench_recipe                       # LLaMA-7B's shapes, random weights, on a GPU
    python -m benchmarks.bench_recipe --limit-gb 24 --recover-tokens 1000000 --tune lora    # as on a smaller card
    python -m benchmarks.bench_recipe --shape tiny --device cpu

Scoring is `hywia_kernels.measure` on random tokens, one fusion included, and is timed `--runs` times after a warm-up.
The other steps are those of `hywia_kernels.compress`, which runs once and records their seconds; with
`--recover-tokens`, a recovery on text that the model writes is among them. `param_mix` is LLM-Pruner's scoring by the
flow of `benchmarks/llm_pruner.py`, with its ten samples; `--no-peer` leaves it out. `all` is the sum of the steps, once
each, and the most memory that was in use while they ran, the model included. Random weights learn nothing, so the
recovery goes on to its last step, whatever its checks say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import hywia_kernels as hk
from hywia_kernels import settings
from hywia_kernels.arch.facts import count_parameters
from hywia_kernels.settings import TUNES

from . import llm_pruner, models
from .bench_engine import measure
from .memory import Peak, free
from .session import Session, argv_of, at_least, common_arguments, make_parser, parse

MODULE = "benchmarks.bench_recipe"
PEER, WHOLE = "param_mix", "all"
COLUMNS = {
    **dict.fromkeys(("shape", "dtype", "weights", "step"), str),
    **dict.fromkeys(("layers", "samples", "reconstruct_samples"), int),
    "ratio": float,
    "recover_tokens": int,  # to train on; 0: no recovery
    **dict.fromkeys(("tune", "hold"), str),
    "limit_bytes": int,  # that the process was allowed on the device; empty: all
    "seconds": float,
    "peak_bytes": int,  # of `all`
    "times_param_mix": float,  # of scoring's seconds
    "layer_passes": int,
}
_NEVER = 1_000_000  # checks without a lower divergence: more than a run has


def words(vocabulary: int) -> Any:
    """A tokenizer of so many words, each an ordinary one: what a model with random weights needs to write."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core)


def limit(device: torch.device, gigabytes: float | None) -> int | None:
    """Allow the process so many GB of a GPU, and return them in bytes."""
    if gigabytes is None or device.type != "cuda":
        return None
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    return int(gigabytes * 1e9)


def run(arguments: argparse.Namespace, session: Session) -> None:
    """A row a step."""
    device = arguments.device
    allowed = limit(device, arguments.limit_gb)
    torch.manual_seed(arguments.seed)
    model = models.build(arguments.shape, arguments.layers, arguments.dtype, device)
    recovery = None
    if arguments.recover_tokens:
        recovery = hk.Recovery(tokens=arguments.recover_tokens, tune=arguments.tune, patience=_NEVER)
    recipe = hk.Recipe(
        ratio=arguments.ratio,
        align=arguments.align,
        samples=arguments.samples,
        reconstruct_samples=arguments.reconstruct_samples,
        layer_passes=arguments.layer_passes,
        recover=recovery,
    ).resolved(device.type, count_parameters(model))
    tokens = models.token_ids(model, recipe.text_samples(), 128, device).cpu()
    known = {
        **models.description(model, arguments.shape, arguments.dtype),
        "samples": recipe.samples,
        "reconstruct_samples": recipe.reconstruct_samples,
        "layer_passes": recipe.layer_passes,
        "ratio": arguments.ratio,
        "recover_tokens": arguments.recover_tokens or 0,
        "limit_bytes": allowed,
    }

    def add(step: str, seconds: float, **more: Any) -> None:
        session.add(**{**dict.fromkeys(COLUMNS), **known, **more, "step": step, "seconds": seconds})
        held = f"  {more['peak_bytes'] / 1e9:.1f} GB" if more.get("peak_bytes") else ""
        times = f"  {more['times_param_mix']:.2f} times param_mix" if more.get("times_param_mix") else ""
        print(f"{step:<24} {seconds:>10.3f} s{held}{times}", flush=True)

    def several(call: Callable[[], Any]) -> tuple[Any, float]:
        measured = measure(call, device, arguments.runs, 20.0)
        return measured.result, measured.reading.median

    theirs = None
    if not arguments.no_peer:
        peer = models.token_ids(model, 10, 128, device)
        theirs = several(lambda: llm_pruner.score(model, peer, PEER))[1]
        add(PEER, theirs)
    model.zero_grad(set_to_none=True)
    free(device)
    peak = Peak(device)
    measured, scoring = several(lambda: hk.measure(model, None, recipe, tokens=tokens))
    add("scoring", scoring, times_param_mix=scoring / theirs if theirs else None)
    tokenizer = words(model.get_output_embeddings().weight.shape[0])
    record = hk.compress(model, tokenizer, recipe, measured=measured).record
    told = record.get("recovery") or {}
    for step, seconds in record["seconds"].items():
        add(step, seconds)
    if told:  # a part of the recovery's
        add("recovery text", told["text_seconds"])
    more = {"tune": told.get("tune"), "hold": told.get("hold"), "peak_bytes": peak.bytes()}
    add(WHOLE, scoring + sum(record["seconds"].values()), **more)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(MODULE, __doc__)
    common_arguments(parser, runs=3, model=models.NAMES)
    parser.add_argument("--samples", type=int, default=settings.SAMPLES)
    parser.add_argument("--reconstruct-samples", type=int, help="default: the recipe's for the device")
    parser.add_argument("--layer-passes", type=int, help="default: the recipe's for the device")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--align", type=int, default=64)
    parser.add_argument("--recover-tokens", type=at_least(1), metavar="N", help="that a recovery trains on")
    parser.add_argument("--tune", choices=TUNES, help="what it trains")
    parser.add_argument("--limit-gb", type=float, metavar="X", help="of the GPU's memory, for the process")
    parser.add_argument("--no-peer", action="store_true", help="without LLM-Pruner's scoring")
    return parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    argv = argv_of(argv)
    arguments = _arguments(argv)
    session = Session(arguments, MODULE, argv, COLUMNS)
    run(arguments, session)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
