"""What a recovery spends its time on: text that the dense model writes, and training steps of the cut one.

    python -m benchmarks.bench_recovery                         # SmolLM2 with half of its parameters, on this machine
    python -m benchmarks.bench_recovery --shape 7b --dtype bfloat16 --tune lora

`writer`: `static` is the package's writer, in CUDA graphs on a GPU, `generate` transformers' own with a processor that
draws the same tokens. `step`: forward and backward of a batch, the dense model's forward and the optimiser's step
included, of what is tuned: `eager`; `compiled` decoder layers; forward and backward `captured` as a CUDA graph; and
both, which is what a recovery does on a GPU where it pays. Peaks are of all that is there, both models too. The cut
model keeps units by their magnitude, uniformly: times are those of any choice.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import hywia_kernels as hk
from hywia_kernels.method import writing
from hywia_kernels.method.criteria import magnitude
from hywia_kernels.method.recovery.distilled import Distilled
from hywia_kernels.method.recovery.stepping import CapturedStep, compiled
from hywia_kernels.method.recovery.teacher import Live
from hywia_kernels.method.recovery.tuning import prepared
from hywia_kernels.method.sampling import uniforms
from hywia_kernels.settings import SEQ_LEN, TUNES

from . import memory, models
from .session import Session, argv_of, at_least, common_arguments, make_parser, parse
from .timing import Timer

MODULE = "benchmarks.bench_recovery"
COLUMNS = {
    **dict.fromkeys(("shape", "weights", "part", "way", "dtype", "tune"), str),
    "ratio": float,  # of the parameters that the cut model lacks
    "samples": int,  # written at once, or of a step
    "length": int,
    **dict.fromkeys(("ms", "ms_p20", "ms_p80"), float),
    "runs": int,
    "tokens_per_second": float,
    "peak_bytes": int,
}
WAYS = ("eager", "compiled", "captured", "compiled captured")
_ALWAYS = 10**12  # tokens to come, so that layers are compiled


def cut_of(model: Any, ratio: float) -> Any:
    """A smaller copy of a model, of layers alike."""
    cut = copy.deepcopy(model)
    hk.prune(cut, hk.plan(magnitude(cut), ratio=ratio, align=1))
    return cut


def writers(model: Any, starts: Tensor, length: int) -> dict[str, Callable[[], Tensor]]:
    """Way -> text `[samples, length]` from the given beginnings."""
    ordinary = list(range(model.get_output_embeddings().weight.shape[0]))
    uniform = uniforms(len(starts), length, 1)
    device = model.get_input_embeddings().weight.device

    def static() -> Tensor:
        written = writing.driven(model, starts, uniform, ordinary, len(starts))
        assert written is not None, "no driver runs this model"
        return written

    return {
        "static": static,
        "generate": lambda: writing._generated(model, starts, uniform.to(device), ordinary, len(starts)),
    }


@contextmanager
def step_of(way: str, model: Any, dense: Any, tune: str, samples: int, length: int) -> Iterator[Callable[[], None]]:
    """A training step of one of `WAYS`, on a copy of the cut model."""
    cut = copy.deepcopy(model)
    device = cut.get_input_embeddings().weight.device
    tokens = models.token_ids(dense, samples, length, device)
    index = torch.arange(samples)
    with prepared(cut, tune, 32) as tuned:
        cuda = device.type == "cuda"
        distilled = Distilled(cut, tuned, Live(dense), 0.0, autocast=cuda)
        parameters = list(tuned.parameters.values())
        optimiser = torch.optim.AdamW(parameters, lr=1e-5, fused=cuda)
        with compiled(distilled, _ALWAYS) if "compiled" in way else nullcontext():
            captured = CapturedStep(distilled, samples, length) if "captured" in way else None

            def step() -> None:
                if captured is not None:
                    captured(tokens, index, 1.0)
                else:
                    distilled(tokens, index)["loss"].backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                optimiser.zero_grad()

            yield step


def run(arguments: argparse.Namespace, session: Session, timer: Timer) -> None:
    """A row a way of writing and of training."""
    device, length = arguments.device, arguments.length
    dense = models.build(arguments.shape, arguments.layers, arguments.dtype, device)
    known = {
        "shape": arguments.shape,
        "weights": "pretrained" if arguments.shape == models.SMOLLM2 else "random",
        "dtype": arguments.dtype,
        "length": length,
    }

    def add(part: str, way: str, samples: int, call: Callable[[], Any], **more: Any) -> None:
        try:
            memory.free(device)
            peak = memory.Peak(device)
            call()  # compiles, and makes the optimiser's state
            reading = timer.call(call, cold=False)
        except torch.cuda.OutOfMemoryError:
            print(f"{part} {way} {samples}: does not fit", flush=True)
            return
        ms = {column: us / 1e3 for column, us in reading.columns("ms").items()}
        told = {**known, **more, "part": part, "way": way, "samples": samples, "runs": reading.runs}
        rate = samples * length / (ms["ms"] / 1e3)
        figures = {**told, **ms, "tokens_per_second": rate, "peak_bytes": peak.bytes()}
        row = session.add(**{**dict.fromkeys(COLUMNS), **figures})
        held = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:8.1f} GB"
        print(f"{part:<7} {way:<18} {samples:>6} {row.ms:>10.1f} ms {rate:>10,.0f} tokens/s {held}", flush=True)

    for samples in arguments.written:
        starts = models.token_ids(dense, samples, 2, torch.device("cpu"))
        for way, call in writers(dense, starts, length).items():
            if arguments.only is None or way in arguments.only:
                add("writer", way, samples, call)
    cut = cut_of(dense, arguments.ratio)
    for tune in arguments.tune:
        for samples in arguments.samples:
            for way in WAYS if device.type == "cuda" else WAYS[:1]:
                if arguments.only is None or way in arguments.only:
                    with step_of(way, cut, dense, tune, samples, length) as call:
                        add("step", way, samples, call, tune=tune, ratio=arguments.ratio)
                    memory.free(device)


def main(argv: Sequence[str] | None = None) -> int:
    argv = argv_of(argv)
    parser = make_parser(MODULE, __doc__)
    common_arguments(parser, runs=5)
    parser.add_argument("--shape", choices=models.NAMES, default=models.SMOLLM2, help="default: %(default)s")
    parser.add_argument("--layers", type=at_least(1), help="the first so many")
    parser.add_argument("--dtype", choices=tuple(models.DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--ratio", type=float, default=0.5, help="of the parameters that go; default: %(default)s")
    parser.add_argument("--length", type=at_least(2), default=SEQ_LEN, help="tokens of a sample; default: %(default)s")
    parser.add_argument("--tune", nargs="+", choices=TUNES, default=["full", "lora"], help="default: full lora")
    parser.add_argument("--samples", type=at_least(1), nargs="+", help="of a step; default: 64 on a GPU, 8 on a CPU")
    parser.add_argument("--written", type=at_least(1), nargs="*", help="at once; default: 4096 on a GPU, 64 on a CPU")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="these ways alone")
    arguments = parse(parser, argv)
    cuda = arguments.device.type == "cuda"
    arguments.samples = arguments.samples or [64 if cuda else 8]
    arguments.written = [4096 if cuda else 64] if arguments.written is None else arguments.written
    session = Session(arguments, MODULE, argv, COLUMNS)
    run(arguments, session, Timer(arguments.device, arguments.runs))
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
