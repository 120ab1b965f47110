"""Streamed scoring at the shapes it is for: weights on the device, in pinned memory or in files; one process or more.

    python -m benchmarks.bench_scale --shape 7b --samples 128 --places device --compare
    python -m benchmarks.bench_scale --shape 70b --layers 40 --samples 96 --places host --limit-gb 24
    python -m benchmarks.bench_scale --shape 70b --layers 40 --samples 96 --places files --folder /data/model
    torchrun --nproc_per_node=2 -m benchmarks.bench_scale --shape 70b --layers 40 --samples 96 --places host

Flows: `streamed`, and with `--compare` `lean`, which is `calibrate` of the same order in that memory mode, where the
device holds the model. Seconds are those of one whole call, median after a warm-up. `copy_seconds` is what the bytes
that moved take at the rate of a copy of one layer that was measured in the same run: a scoring cannot take less than
that, nor less than the same samples with the weights on the device. Of the seconds, `seconds_prepared` go to pinning
the host's memory and to buffers. Before anything is timed, two layers of the shape have to give what `calibrate` gives.
Of several processes the first one prints and writes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hywia_kernels as hk
from hywia_kernels.scale.launch import launched_ranks
from hywia_kernels.scale.place import device_of_rank
from hywia_kernels.scale.ranks import Ranks, joined

from . import models
from .memory import free
from .rows import Row
from .session import Session, argv_of, at_least, common_arguments, make_parser, parse
from .timing import Reading

MODULE = "benchmarks.bench_scale"
PLACES = ("device", "host", "files")
PARTS = ("seconds_prepared", "seconds_forward", "seconds_backward", "seconds_waited")  # as the record has them
BOUNDS = {"float32": 1e-6, "bfloat16": 3e-2, "float16": 3e-2}  # of the fine sums: other sizes of runs, other rounding
COLUMNS = {
    "shape": str,
    "layers": int,
    "dtype": str,
    "weights": str,
    "flow": str,
    "place": str,
    "ranks": int,
    "samples": int,
    "length": int,
    "runs": int,
    **dict.fromkeys(("seconds", "seconds_p20", "seconds_p80"), float),
    **dict.fromkeys(PARTS, float),
    "bytes_moved": int,
    "copy_seconds": float,
    "peak_bytes": int,
    "limit_bytes": int,
}


def build(shape: str, layers: int | None, dtype: str, device: torch.device) -> nn.Module:
    """A random model whose layers are copies of one: values do not change the time, and making them would take longer
    than measuring."""
    model: Any = models.build(shape, 1, dtype, device)
    count = models.SHAPES[shape]["num_hidden_layers"] if layers is None else layers
    model.model.layers = nn.ModuleList(copy.deepcopy(model.model.layers[0]) for _ in range(count))
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = count
    if hasattr(model.config, "layer_types"):
        model.config.layer_types = model.config.layer_types[:1] * count
    return model


def agree(arguments: argparse.Namespace, device: torch.device) -> float:
    """How far the fine sums of two layers are from `calibrate`'s, relative to the largest."""
    model = models.build(arguments.shape, 2, arguments.dtype, device)
    ids = models.token_ids(model, 3, arguments.length, device).cpu()
    one, other = hk.calibrate_streamed(model, ids), hk.calibrate(model, ids, memory="lean", orders=("second",))
    pairs = ((one.fine[g.name]["second"], other.fine[g.name]["second"]) for g in one.groups)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def copy_rate(model: Any, place: str, device: torch.device) -> float | None:
    """Bytes a second of copies of one layer to the device, from pinned memory; None where nothing is copied."""
    if place == "device" or device.type != "cuda":
        return None
    size = sum(p.nbytes for p in model.model.layers[0].parameters())
    source, target = torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.empty(size, dtype=torch.uint8)
    target = target.to(device)
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        best = max(best, size / (time.perf_counter() - began))
    return best


def opened(arguments: argparse.Namespace, place: str, device: torch.device, ranks: Ranks) -> Any:
    """The model with its weights where they are to stay."""
    if place != "files":
        where = device if place == "device" else torch.device("cpu")
        return build(arguments.shape, arguments.layers, arguments.dtype, where)
    folder: Path = arguments.folder
    if ranks.speaks and not (folder / "config.json").exists():
        from tests.support.tokenizers import byte_tokenizer

        made: Any = build(arguments.shape, arguments.layers, arguments.dtype, torch.device("cpu"))
        made.save_pretrained(folder, max_shard_size="5GB")
        byte_tokenizer().save_pretrained(folder)
        del made
    ranks.meet("the files")
    return hk.open_stored(folder)


def measure(arguments: argparse.Namespace, place: str, device: torch.device, ranks: Ranks) -> list[dict[str, Any]]:
    """The figures of each flow with the weights in one place."""
    free(device)
    model = opened(arguments, place, device, ranks)
    ids = token_ids(arguments.samples, arguments.length)
    rate = copy_rate(model, place, device)
    about = {
        "shape": arguments.shape,
        "layers": len(model.model.layers),
        "dtype": arguments.dtype,
        "weights": "random",
        "place": place,
        "ranks": ranks.size,
        "samples": arguments.samples,
        "length": arguments.length,
        "limit_bytes": None if arguments.limit_gb is None else int(arguments.limit_gb * 1e9),
    }
    rows = []
    for flow in ("streamed", *(("lean",) if arguments.compare and place == "device" and ranks.size == 1 else ())):
        times, record = [], {}
        for _ in range(arguments.runs + 1):
            ranks.meet("a reading")
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            if flow == "streamed":
                record = dict(hk.calibrate_streamed(model, ids, device=device, weights=place, ranks=ranks).record)
            else:
                record = dict(hk.calibrate(model, ids, memory="lean", orders=("second",)).record)
            times.append(time.perf_counter() - began)
        reading = Reading.of(times[1:])
        moved = record.get("bytes_moved", 0)
        rows.append(
            {
                **about,
                "flow": flow,
                "runs": record["runs"],
                "seconds": reading.median,
                "seconds_p20": reading.low,
                "seconds_p80": reading.high,
                **{name: record.get(name) for name in PARTS},
                "bytes_moved": moved,
                "copy_seconds": None if rate is None else 2 * moved_once(model) / rate,
                "peak_bytes": record["peak_bytes"],
            }
        )
    return rows


def moved_once(model: Any) -> int:
    """Bytes of all layers."""
    return sum(p.numel() * p.element_size() for p in model.model.layers.parameters())


def token_ids(samples: int, length: int) -> Tensor:
    """Random ids, the same in every process."""
    return torch.randint(3, 250, (samples, length), generator=torch.Generator().manual_seed(1))


def say(row: Row) -> None:
    moved = "" if row.copy_seconds is None else f", copies alone {row.copy_seconds:.2f} s"
    peak = "" if row.peak_bytes is None else f", peak {row.peak_bytes / 1e9:.2f} GB"
    print(
        f"{row.flow} {row.shape} x {row.layers} layers, {row.place}, {row.ranks} processes, {row.samples} x "
        f"{row.length}: {row.seconds:.2f} s ({row.samples / row.seconds:.1f} samples a second){moved}{peak}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    argv = argv_of(arguments)
    parser = make_parser(MODULE, __doc__ or "")
    common_arguments(parser, runs=3, model=models.SHAPES)
    parser.add_argument("--samples", type=at_least(1), default=96, help="default: %(default)s")
    parser.add_argument("--length", type=at_least(2), default=128, help="tokens of a sample; default: %(default)s")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=["device"], help="default: device")
    parser.add_argument("--folder", type=Path, help="of --places files: the model's, made where there is none")
    parser.add_argument("--limit-gb", type=float, help="of the device's memory that the process may take")
    parser.add_argument("--compare", action="store_true", help="measure calibrate's lean mode beside it")
    given = parse(parser, argv)
    if "files" in given.places and given.folder is None:
        parser.error("--folder: needed for --places files")
    device = device_of_rank("auto" if given.device.type == "cuda" else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        if given.limit_gb is not None:
            whole = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(given.limit_gb * 1e9 / whole, device)
    first = launched_ranks()[0] == 0
    with contextlib.ExitStack() as stack:
        if not first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            given.csv = given.json = None
        ranks = stack.enter_context(joined(device))
        session = Session(given, MODULE, argv, COLUMNS)
        error = agree(given, device)
        print(f"two layers: fine sums within {error:.1e} of calibrate's", flush=True)
        if not error <= BOUNDS[given.dtype]:
            session.fail(f"gate: expected at most {BOUNDS[given.dtype]:.0e}")
            return session.finish()
        for place in given.places:
            for figures in measure(given, place, device, ranks):
                say(session.add(**figures))
        return session.finish()


if __name__ == "__main__":
    sys.exit(main())
