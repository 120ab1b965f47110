"""Models larger than a GPU or a machine: seconds and memory against limits that are measured in the same run.

    python -m benchmarks.bench_large files --shape 70b --layers 40 --folder /data --samples 1024 --csv FILE
    python -m benchmarks.bench_large stream --shape 70b --layers 40 --folder /data --samples 10 96 --gpu-gb 24
    python -m benchmarks.bench_large ranks --shape 7b --ranks 1 2 4 8 --samples 128 --csv FILE

`files` writes a checkpoint of random weights below `--folder`, copies it, cuts it from files to files at `--ratio`, and
does the same with a reconstruction on `--samples`; each begins with files that are not in memory. The limit is the
copy. `stream` scores from the host's memory and from the files, the device kept to `--gpu-gb`; the limit is the larger
of the compute (of the first layers, as many as fit, times the layers) and the transfer (of as many bytes by the link,
or the disk). `ranks` scores a model that every device holds, by one process a device: strong (`--samples` in all) and
weak (`--samples` each); the limit is one process's time over the number of them (strong), or that time itself (weak).
`ratio` is seconds over the limit's, and `units` a digest of the statistics' order, which must not depend on the ranks.
"""

from __future__ import annotations

import argparse
import hashlib
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

from . import checkpoints, models, streamed
from .memory import HostPeak, spending
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
}


def digest(statistics: Any) -> str:
    """Of the order in which second-order sums put the units of each group."""
    told = hashlib.sha256()
    for name in sorted(statistics.fine):
        told.update(statistics.fine[name]["second"].argsort(stable=True).numpy().tobytes())
    return told.hexdigest()[:12]


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
        tokens = torch.randint(64, (samples, given.length), generator=torch.Generator().manual_seed(given.seed))
        refit: Callable[[], Any] = lambda text=tokens: hk.prune_files(  # noqa: E731
            stored, plan, out, refit=text, device=str(given.device)
        )
        run("refit", refit, copied, samples=samples, length=given.length)


def stream(given: argparse.Namespace, session: Session, folder: Path) -> None:
    source = folder / "model"
    checkpoints.write(source, given.shape, given.layers, given.dtype, given.device)
    weights = sum(f.stat().st_size for f in checkpoints.weight_files(source))
    if given.gpu_gb and given.device.type == "cuda":
        total = torch.cuda.get_device_properties(given.device).total_memory
        torch.cuda.set_per_process_memory_fraction(given.gpu_gb * 1e9 / total, given.device)
    for samples in given.samples:
        tokens = torch.randint(64, (samples, given.length), generator=torch.Generator().manual_seed(given.seed))
        compute, layers = streamed.compute_seconds(given.shape, given.dtype, given.device, tokens)
        for place in given.places:
            model = streamed.placed(source, place, given.device)
            count = len(model.model.layers)
            transfer = streamed.transfer_seconds(model, source, place, given.device)
            checkpoints.forget(source)
            with HostPeak() as host, spending(given.device) as spent:
                statistics = streamed.scored(model, tokens, given.device, place)
            limits = {"compute": compute * count / layers, "transfer": transfer}
            limit = max(limits, key=lambda name: limits[name])
            row = session.add(
                work="score",
                place=place,
                **described(model, given),
                weight_bytes=weights,
                ranks=1,
                samples=samples,
                length=given.length,
                seconds=spent.seconds,
                samples_s=samples / spent.seconds,
                peak_bytes=spent.peak_bytes if given.device.type == "cuda" else None,
                host_bytes=host.bytes,
                limit=limit,
                limit_seconds=limits[limit],
                ratio=spent.seconds / limits[limit],
                units=digest(statistics),
            )
            report(row)
            del model, statistics


def ranks(given: argparse.Namespace, session: Session, folder: Path) -> None:
    alone: dict[int, float] = {}
    units: dict[int, str] = {}
    for scaling in ("strong", "weak"):
        for size in given.ranks:
            for samples in given.samples:
                total = samples if scaling == "strong" else samples * size
                told = _launched(given, size, total, folder)
                if size == 1:
                    alone[samples] = told["seconds"]
                if units.setdefault(total, told["units"]) != told["units"]:
                    session.fail(f"{size} ranks, {total} samples: other units than by fewer ranks")
                one = alone.get(samples)
                limit = None if one is None else one / size if scaling == "strong" else one
                against = {} if limit is None else {"limit": "one rank", "limit_seconds": limit}
                row = session.add(
                    work="score",
                    place="device",
                    ranks=size,
                    scaling=scaling,
                    samples=total,
                    length=given.length,
                    samples_s=total / told["seconds"],
                    **told,
                    **against,
                    ratio=None if limit is None else told["seconds"] / limit,
                )
                report(row)


def _launched(given: argparse.Namespace, size: int, samples: int, folder: Path) -> dict[str, Any]:
    """What `work` found, run by so many processes."""
    out = folder / "told.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", "-m", MODULE]
    command += ["work", "--device", given.device.type, "--shape", given.shape, "--dtype", given.dtype]
    command += ["--samples", str(samples), "--length", str(given.length), "--seed", str(given.seed)]
    command += ["--folder", str(folder), *([] if given.layers is None else ["--layers", str(given.layers)])]
    subprocess.run(command, check=True)
    return json.loads(out.read_text())


def work(given: argparse.Namespace, session: Session, folder: Path) -> None:
    """One of the processes of `ranks`: the faster of two scorings, as the first one tells it."""
    device = streamed.device_of_process(given.device)
    torch.manual_seed(given.seed)  # every process has the same weights
    model = models.build(given.shape, given.layers, given.dtype, device)
    tokens = torch.randint(64, (given.samples[0], given.length), generator=torch.Generator().manual_seed(given.seed))
    seconds, statistics = [], None
    with streamed.joined(device) as group:
        for _ in range(2):
            with spending(device) as spent:
                statistics = streamed.scored(model, tokens, device, "device", group)
            seconds.append(spent.seconds)
        first = group.rank == 0
    if first:
        told = {
            **described(model, given),
            "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "seconds": min(seconds),
            "peak_bytes": spent.peak_bytes if device.type == "cuda" else None,
            "units": digest(statistics),
        }
        (folder / "told.json").write_text(json.dumps(told))


def described(model: Any, given: argparse.Namespace) -> dict[str, Any]:
    return {"shape": given.shape, "layers": model.config.num_hidden_layers, "dtype": given.dtype}


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
    parser.add_argument("--places", nargs="+", choices=("host", "files"), default=["host", "files"])
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
