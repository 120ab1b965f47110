"""Models larger than a GPU or a machine: seconds and memory against limits that are measured in the same run.

    python -m benchmarks.bench_large files --shape 70b --layers 40 --folder /data --samples 1024 --csv FILE
    python -m benchmarks.bench_large stream --shape 70b --layers 40 --places host --samples 10 96 --gpu-gb 24
    python -m benchmarks.bench_large stream --shape 70b --layers 40 --places files --folder /data
    python -m benchmarks.bench_large stream --shape 7b --places device --samples 128 --compare
    python -m benchmarks.bench_large ranks --shape 7b --ranks 1 2 4 8 --samples 128 --csv FILE
    python -m benchmarks.bench_large ranks --shape 7b --ranks 1 2 --samples 128 --orders first second mixed
    python -m benchmarks.bench_large ranks --shape 70b --layers 40 --ranks 1 2 --places host

`files` writes a checkpoint of random weights below `--folder`, copies it, cuts it from files to files at `--ratio`, and
does the same with a reconstruction on `--samples`; each begins with files that are not in memory. The limit is the
copy. `stream` scores with the weights on the device, in the host's memory or in files, the device kept to `--gpu-gb`;
the limit is the larger of the compute (of the first two layers, times the layers) and the transfer (of as many bytes by
the link, or the disk), or with `--compare`, of a model on the device, `calibrate`'s lean mode. `ranks` scores with one
process a device: strong (`--samples` in all) and weak (`--samples` each); the limit is one process's time over the
number of them (strong), or that time itself (weak). `ratio` is seconds over the limit's, and `units` a digest of the
statistics' order, which must not depend on the ranks, nor on the place, but that files hold other weights. Before
anything is scored, two layers of the shape have to give what `calibrate` gives.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import hywia_kernels as hk
from hywia_kernels.checkpoint.stored_model import open_stored
from hywia_kernels.deploy import planning
from hywia_kernels.scale.place import device_of_rank
from hywia_kernels.scale.ranks import joined
from hywia_kernels.settings import ORDERS

from . import checkpoints, models, streamed
from .memory import HostPeak, Spent, spending
from .session import Session, add_dtype, argv_of, at_least, common_arguments, make_parser, parse

MODULE = "benchmarks.bench_large"

# What is timed is in `work`; `place` says where the weights stay, "disk" for a cut. `peak_bytes` are the device's, and
# `host_bytes` the process's own memory above what it had, without pages of files.
COLUMNS = {
    "work": str,
    "place": str,
    "shape": str,
    "layers": int,
    "dtype": str,
    "weight_bytes": int,
    "ranks": int,
    "scaling": str,
    "samples": int,
    "length": int,
    "seconds": float,
    "samples_s": float,
    "peak_bytes": int,
    "host_bytes": int,
    "limit": str,
    "limit_seconds": float,
    "ratio": float,
    "units": str,
    "orders": str,
    **streamed.PARTS,
}
BOUNDS = {"float32": 1e-6, "bfloat16": 3e-2, "float16": 3e-2}  # of the fine sums: other sizes of runs, other rounding


def plan_of(stored: Any, ratio: float) -> hk.Plan:
    """A plan of this size whose units go by chance, for the model that the files hold."""
    generator = torch.Generator().manual_seed(0)
    alike = planning.alike(stored.model)
    values = {g.name: torch.rand(g.units, generator=generator) for g in alike.groups}
    plan = hk.plan(replace(alike, values=values, loss={}), ratio=ratio, units=("mlp", "attention"), align=1)
    return replace(plan, fingerprint=stored.whole_fingerprint())


def files(given: argparse.Namespace, session: Session, folder: Path) -> None:
    source = folder / "model"
    checkpoints.write(source, given.shape, given.layers, given.dtype, given.device)
    stored = open_stored(source)
    plan = plan_of(stored, given.ratio)
    weights = sum(f.stat().st_size for f in checkpoints.weight_files(source))
    facts = {"place": "disk", **described(stored.model, given), "weight_bytes": weights, "ranks": 1}

    def run(work: str, what: Callable[[], Any], limit: float | None, **figures: Any) -> float:
        checkpoints.forget(source)
        with HostPeak() as host, spending(given.device) as spent:
            what()
        shutil.rmtree(folder / "out")
        on_device = spent.peak_bytes if given.device.type == "cuda" else None
        against = {} if limit is None else {"limit": "copy", "limit_seconds": limit, "ratio": spent.seconds / limit}
        figures |= {"seconds": spent.seconds, "peak_bytes": on_device, "host_bytes": host.bytes}
        report(session.add(work=work, **facts, **figures, **against))
        return spent.seconds

    out = folder / "out"
    copied = run("copy", lambda: checkpoints.copy(source, out), None)
    run("cut", lambda: hk.prune_files(stored, plan, out), copied)
    for samples in given.samples:
        tokens = streamed.token_ids(samples, given.length, given.seed)
        refit: Callable[[], Any] = lambda text=tokens: hk.prune_files(  # noqa: E731
            stored, plan, out, refit=text, device=str(given.device)
        )
        run("refit", refit, copied, samples=samples, length=given.length)


def gate(given: argparse.Namespace, session: Session) -> bool:
    """Whether two layers give what `calibrate` gives."""
    bound = BOUNDS[given.dtype]
    error = streamed.distance(given.shape, given.dtype, given.device, given.length, given.orders)
    print(f"two layers: fine sums within {error:.1e} of calibrate's", flush=True)
    if not error <= bound:
        session.fail(f"gate: expected at most {bound:.0e} from calibrate's sums, got {error:.1e}")
    return error <= bound


def placed(given: argparse.Namespace, place: str, source: Path, device: torch.device) -> Any:
    """The model with its weights where they are to stay; from files where they are in a checkpoint."""
    if source.exists() and place != "device":
        return open_stored(source)
    where = device if place == "device" else torch.device("cpu")
    return streamed.built(given.shape, given.layers, given.dtype, device, where, given.seed)


def stream(given: argparse.Namespace, session: Session, folder: Path) -> None:
    source, places = folder / "model", given.places or ["host", "files"]
    if "files" in places:
        checkpoints.write(source, given.shape, given.layers, given.dtype, given.device)
    if given.gpu_gb and given.device.type == "cuda":
        total = torch.cuda.get_device_properties(given.device).total_memory
        torch.cuda.set_per_process_memory_fraction(given.gpu_gb * 1e9 / total, given.device)
    for place in places if gate(given, session) else ():
        model = placed(given, place, source if place == "files" else folder / "none", given.device)
        facts = {**described(model, given), "place": place, "ranks": 1, "length": given.length}
        for samples in given.samples:
            tokens = streamed.token_ids(samples, given.length, given.seed)
            limits = streamed.limits(model, source, place, given.device, tokens, given, given.orders)
            if given.compare and place == "device":
                seconds, figures = lean(model, tokens, given)
                report(session.add(work="lean", **facts, samples=samples, **figures))
                limits = {"lean": seconds}
            if place == "files":
                checkpoints.forget(source)
            with HostPeak() as host:
                statistics, spent = streamed.scored(model, tokens, given.device, place, given.orders)
            limit = max(limits, key=lambda name: limits[name])
            against = {"limit": limit, "limit_seconds": limits[limit], "ratio": spent.seconds / limits[limit]}
            figures = figures_of(statistics, spent, given.device) | {"host_bytes": host.bytes}
            report(session.add(work="score", **facts, samples=samples, **figures, **against))
            del statistics
        del model


def lean(model: Any, tokens: torch.Tensor, given: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """`(seconds, figures)` of `calibrate` on the device that holds the model: the faster of two."""
    took = []
    for _ in range(2):
        with spending(given.device) as spent:
            statistics = hk.calibrate(model, tokens, memory="lean", orders=given.orders)
        took.append(spent)
    best = min(took, key=lambda s: s.seconds)
    return best.seconds, figures_of(statistics, best, given.device)


def figures_of(statistics: Any, spent: Spent, device: torch.device) -> dict[str, Any]:
    record = statistics.record
    return {
        "orders": " ".join(statistics.orders),
        "seconds": spent.seconds,
        "samples_s": record["samples"] / spent.seconds,
        "peak_bytes": spent.peak_bytes if device.type == "cuda" else None,
        "units": streamed.order_digest(statistics),
        **{name: record.get(name) for name in streamed.PARTS},
    }


def ranks(given: argparse.Namespace, session: Session, folder: Path) -> None:
    if not gate(given, session):
        return
    places = given.places or ["device"]
    if set(places) - {"device"}:  # which the processes of a host hold together, or read
        checkpoints.write(folder / "model", given.shape, given.layers, given.dtype, given.device)
    alone: dict[tuple[str, int], float] = {}
    units: dict[int, str] = {}
    for place, scaling, size, samples in itertools.product(places, ("strong", "weak"), given.ranks, given.samples):
        total = samples if scaling == "strong" else samples * size
        told = _launched(given, place, size, total, folder)
        if size == 1:
            alone[place, samples] = told["seconds"]
        if units.setdefault(total, told["units"]) != told["units"]:
            session.fail(f"{size} ranks, {place}, {total} samples: other units than before")
        one = alone.get((place, samples))
        limit = None if one is None else one / size if scaling == "strong" else one
        against = {} if limit is None else {"limit": "one rank", "limit_seconds": limit}
        ratio = None if limit is None else told["seconds"] / limit
        facts = {"work": "score", "place": place, "ranks": size, "scaling": scaling, "samples": total}
        report(session.add(**facts, length=given.length, **told, **against, ratio=ratio))


def _launched(given: argparse.Namespace, place: str, size: int, samples: int, folder: Path) -> dict[str, Any]:
    """What `work` found, run by so many processes."""
    out = folder / "told.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", "-m", MODULE]
    command += ["work", "--device", given.device.type, "--shape", given.shape, "--dtype", given.dtype]
    command += ["--samples", str(samples), "--length", str(given.length), "--seed", str(given.seed)]
    command += ["--places", place, "--orders", *given.orders, "--folder", str(folder)]
    subprocess.run([*command, *([] if given.layers is None else ["--layers", str(given.layers)])], check=True)
    return json.loads(out.read_text())


def work(given: argparse.Namespace, session: Session, folder: Path) -> None:
    """One of the processes of `ranks`, of which the first one tells what came of it."""
    device = device_of_rank(given.device.type)
    model = placed(given, given.places[0], folder / "model", device)
    tokens = streamed.token_ids(given.samples[0], given.length, given.seed)
    with joined(device) as group:
        statistics, spent = streamed.scored(model, tokens, device, given.places[0], given.orders, group)
        first = group.rank == 0
    if first:
        told = {**described(model, given), **figures_of(statistics, spent, device)}
        (folder / "told.json").write_text(json.dumps(told))


def described(model: Any, given: argparse.Namespace) -> dict[str, Any]:
    parameters = {id(p): p for p in streamed.network(model).parameters()}.values()
    return {
        "shape": given.shape,
        "layers": len(streamed.network(model).model.layers),
        "dtype": given.dtype,
        "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def report(row: Any) -> None:
    figures = {name: row.figures.get(name) for name in ("work", "place", "ranks", "scaling", "samples", "seconds")}
    told = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in figures.values() if value]
    if row.figures.get("ratio") is not None:
        told.append(f"{row.ratio:.3f} of {row.limit}'s {row.limit_seconds:.4g} s")
    if row.figures.get("host_bytes"):
        told.append(f"{row.host_bytes / 1e9:.2f} GB of the host's memory")
    print(" ".join(told), flush=True)


PARTS = {"files": files, "stream": stream, "ranks": ranks, "work": work}


def main(arguments: Sequence[str] | None = None) -> int:
    argv = argv_of(arguments)
    parser = make_parser(MODULE, __doc__ or "")
    parser.add_argument("part", choices=tuple(PARTS))
    common_arguments(parser)
    parser.add_argument("--shape", choices=tuple(models.SHAPES), help="default: 7b on a GPU, a small one on a CPU")
    parser.add_argument("--layers", type=at_least(1), metavar="N", help="the first N decoder layers only")
    add_dtype(parser)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary one")
    parser.add_argument("--samples", type=at_least(1), nargs="*", default=[96], help="default: 96; none: no refit")
    parser.add_argument("--length", type=at_least(2), default=128, help="tokens of a sample; default: 128")
    parser.add_argument("--ratio", type=float, default=0.5, help="of the cut; default: 0.5")
    parser.add_argument("--places", nargs="+", choices=("device", "host", "files"), help="of the weights")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["second"], help="default: second")
    parser.add_argument("--compare", action="store_true", help="measure calibrate's lean mode beside --places device")
    parser.add_argument("--gpu-gb", type=float, help="keep the device to so many GB")
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[1, 2], help="default: 1 2")
    given = parse(parser, argv)
    if given.part == "work":  # told by another run of this
        work(given, None, given.folder)  # type: ignore[arg-type]
        return 0
    session = Session(given, MODULE, argv, COLUMNS)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=given.folder)))
        PARTS[given.part](given, session, folder)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
