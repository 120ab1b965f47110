"""Checkpoints in the engines that serve them: whether they load, whether they write the same, how fast.

    python -m benchmarks.bench_served smollm2 P20 P50 --vocabulary smollm2 --formats F16 Q8_0 Q4_K_M --blocks 40
    python -m benchmarks.bench_served P20 P50 --engines vllm --sequences 1 16 64 --context 512 --new 256
    python -m benchmarks.bench_served SHAPES/dense SHAPES/16x5120 --engines vllm --dummy --context 512 --new 256

A row a checkpoint, engine, format and number of sequences; an engine that does not load it has one row with its words
in `error`. With `--dummy` a directory has a config alone, and vLLM fills in random weights. Needs the engines'
packages: `vllm`; for llama.cpp `gguf`, `xllamacpp` (its server) and `cyllama` (its quantiser, and the logits of
perplexities), and `--vocabulary`, a GGUF file of the model before pruning. llama.cpp runs on the CPU here.

Agreement: eight prompts continued greedily by 24 tokens, against transformers in float32 with the weights in `--dtype`,
in which transformers and vLLM run, and from which llama.cpp's quantiser makes its formats, F16 as well. `same` counts
tokens before the parting, of `asked`; `gap` is the largest difference of the logits of transformers' token and the
engine's where they part, by transformers.

vLLM takes every checkpoint by its directory alone. VLLM_ENABLE_V1_MULTIPROCESSING=0 runs it in this process, which
saves its start for every checkpoint after the first and costs speed.

Speed: `sequences` prompts of `context` random ids at once. `tokens_per_second` are those written, the prompts' time
included; `first_ms` is the time of the same with one token; both medians of `runs` after one that does not count.
Printed is as well what each checkpoint gains over the first, and how much of the ideal (`served_ideal`), on a GPU.
`--clock process` counts the process's own time, for a machine that is not quiet; `load` is the machine's load average.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import hywia_kernels as hk
from hywia_kernels.checkpoint.gguf import write_gguf
from hywia_kernels.checkpoint.sources import located
from hywia_kernels.deploy.cost import cost_of
from hywia_kernels.evaluation import blocks
from hywia_kernels.method.reading import bundled_text

from . import gguf_files, served_ideal
from .served_agreement import NEW, PROMPTS, Reference
from .served_engines import Engine, LlamaCpp, RefusedError, Transformers, Vllm, VllmSettings
from .session import Session, add_dtype, argv_of, at_least, common_arguments, make_parser, parse
from .timing import Timer

MODULE = "benchmarks.bench_served"
COLUMNS = {
    **dict.fromkeys(("checkpoint", "engine", "version", "format", "types", "error"), str),
    **dict.fromkeys(("tensor_parallel", "parameters", "file_bytes", "asked", "same", "parted"), int),
    "gap": float,
    **dict.fromkeys(("sequences", "context", "new"), int),
    "clock": str,
    **dict.fromkeys(("first_ms", "tokens_per_second"), float),
    **dict.fromkeys(("runs", "memory_bytes", "kv_tokens", "blocks"), int),
    **dict.fromkeys(("perplexity", "load", "prefill_flops", "decode_bytes"), float),
}
ENGINES = ("transformers", "llama.cpp", "vllm")
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def speed(engine: Engine, sequences: int, context: int, new: int, vocabulary: int, runs: int, clock: str) -> dict:
    """The columns of speed, and what is held in memory after it."""
    prompts = torch.randint(vocabulary, (sequences, context)).tolist()

    def seconds(tokens: int) -> float:
        return statistics.median(taken(lambda: engine.write(prompts, tokens), CLOCKS[clock]) for _ in range(runs))

    engine.write(prompts, 1)
    first, whole = seconds(1), seconds(new)
    return {
        **{"sequences": sequences, "context": context, "new": new, "clock": clock, "runs": runs},
        **{"first_ms": first * 1e3, "tokens_per_second": sequences * new / whole},
        **{"memory_bytes": engine.held(), "kv_tokens": engine.kv_tokens(), "load": os.getloadavg()[0]},
    }


def taken(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds of a call."""
    began = clock()
    call()
    return clock() - began


def run(arguments: Any, session: Session) -> None:
    """Rows of every checkpoint."""
    for path in arguments.checkpoints:
        with tempfile.TemporaryDirectory() as folder:
            _Checkpoint(path, arguments, session, Path(folder)).run()
        print("\n".join(served_ideal.report(session.rows, path)), flush=True)


class _Checkpoint:
    """One checkpoint's rows; its GGUF files lie in `folder`."""

    def __init__(self, path: str, arguments: Any, session: Session, folder: Path):
        self.path, self.arguments, self.session, self.folder = path, arguments, session, folder
        self.length = max(arguments.context + arguments.new, 64 + NEW)
        self.most = max([len(PROMPTS), *arguments.sequences])
        self.reference: Reference | None = None
        self.text: torch.Tensor | None = None

    def run(self) -> None:
        given = self.arguments
        if given.dummy:
            self.cost, self.vocabulary = served_ideal.of_config(self.path)
        else:
            self.reference = Reference(given.reference or self.path, given.dtype, given.device)
            model, tokenizer = self.reference.model, self.reference.tokenizer
            self.cost, self.vocabulary = cost_of(model), model.get_input_embeddings().num_embeddings
            self.text = blocks(tokenizer, bundled_text(), max_blocks=given.blocks) if given.blocks else None
        self.known = {"checkpoint": self.path, "parameters": self.cost.parameters}
        for engine in given.engines:
            if engine == "transformers":
                self.measure(engine, given.dtype, lambda: Transformers(self.path, given.device, given.dtype))
            elif engine == "vllm":
                self.measure(engine, given.quantization or given.dtype, self.vllm)
            else:
                self.llama_cpp()

    def vllm(self) -> Vllm:
        settings = VllmSettings(**{field.name: getattr(self.arguments, field.name) for field in fields(VllmSettings)})
        return Vllm(self.path, self.most, self.length, self.arguments.dtype, settings)

    def llama_cpp(self) -> None:
        """A row a format and number of sequences; a format that llama.cpp's quantiser refuses has one row."""
        given = self.arguments
        floats = self.folder / "floats.gguf"
        try:
            model, _ = hk.load(self.path, dtype=given.dtype, device="cpu")
            write_gguf(model, located(given.vocabulary).path, floats)
            del model
        except hk.HywiaError as error:
            self.add("llama.cpp", given.dtype, error=str(error))
            return
        for name in given.formats:
            file = self.folder / f"{name}.gguf"
            try:
                gguf_files.quantised(floats, file, name)
            except RuntimeError as error:
                self.add("llama.cpp", name, error=f"quantiser: {error}")
                continue
            told = {"types": gguf_files.counted(file), "file_bytes": file.stat().st_size}
            self.measure("llama.cpp", name, lambda file=file: LlamaCpp(file, self.most, self.length), file, **told)

    def measure(
        self, engine: str, form: str, make: Callable[[], Engine], file: Path | None = None, **told: Any
    ) -> None:
        """The rows of one engine and format."""
        given = self.arguments
        try:
            loaded = make()
        except (ImportError, RefusedError, hk.HywiaError) as error:
            self.add(engine, form, error=str(error), **told)
            return
        try:
            told["version"] = loaded.version
            if self.reference is not None:
                told |= vars(self.reference.against(loaded.write(self.reference.prompts, NEW)))
            if self.text is not None and engine != "vllm":  # it hands out no logits of a whole vocabulary
                told |= {"blocks": len(self.text), "perplexity": self.perplexity(loaded, file)}
            sizes = (given.context, given.new, self.vocabulary, given.runs, given.clock)
            for sequences in given.sequences:
                done = served_ideal.work(self.cost, sequences, given.context, given.new)
                self.add(engine, form, **told, **speed(loaded, sequences, *sizes), **done)
            if not given.sequences:
                self.add(engine, form, **told)
        except RefusedError as error:
            self.add(engine, form, error=str(error), **told)
        finally:
            loaded.close()

    def perplexity(self, engine: Engine, file: Path | None) -> float:
        assert self.text is not None
        if isinstance(engine, Transformers):
            return hk.perplexity(engine.model, self.text)
        assert file is not None
        return gguf_files.perplexity(file, self.text)

    def add(self, engine: str, form: str, **figures: Any) -> None:
        tensors = self.arguments.tensor_parallel if engine == "vllm" else 1
        told = {**self.known, "engine": engine, "format": form, "tensor_parallel": tensors, **figures}
        row = self.session.add(**{**dict.fromkeys(COLUMNS), **told})
        if row.error:
            print(f"{self.path} {engine} {form}: {row.error}", flush=True)
            return
        gap = "" if row.gap is None else f", parting at logits {row.gap:.3g} apart"
        agreed = "random weights" if row.asked is None else f"{row.same} of {row.asked} tokens as transformers{gap}"
        rate = "" if row.sequences is None else f"{row.sequences:>4} x {row.tokens_per_second:,.1f} tokens/s"
        text = "" if row.perplexity is None else f"perplexity {row.perplexity:.2f}"
        print(f"{self.path} {engine} {form}: {agreed}; {rate} {text}", flush=True)


def add_vllm(parser: argparse.ArgumentParser) -> None:
    """vLLM's settings, by the names of `VllmSettings`."""
    of = parser.add_argument_group("vLLM")
    of.add_argument("--tensor-parallel", type=at_least(1), default=1, help="GPUs; default: %(default)s")
    of.add_argument("--eager", action="store_true", help="neither compiled nor captured: for tiny models")
    of.add_argument("--share", type=float, help="of the GPU's memory that it takes; default: vLLM's own")
    of.add_argument("--dummy", action="store_true", help="the directories hold configs; weights are random")
    of.add_argument("--quantization", metavar="NAME", help="fp8: the weights become so as they are loaded")
    of.add_argument(
        "--implementation", metavar="NAME", help="transformers: its code of the family with vLLM's attention"
    )
    of.add_argument("--attention", metavar="BACKEND", help="as TRITON_ATTN; default: the one that vLLM takes by itself")
    of.add_argument("--remote", action="store_true", help="run a directory's code: Nemotron-NAS blocks need it")


def main(argv: Sequence[str] | None = None) -> int:
    argv = argv_of(argv)
    parser = make_parser(MODULE, __doc__)
    common_arguments(parser, seed=True)
    parser.add_argument("checkpoints", nargs="+", help="directories, GGUF files or bundled names")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: all")
    add_dtype(parser)
    formats = tuple(gguf_files.FORMATS)
    parser.add_argument("--formats", nargs="+", choices=formats, default=["F16"], help="of llama.cpp's; default: F16")
    parser.add_argument("--vocabulary", help="a GGUF file, or a bundled name, whose tokenizer llama.cpp's files get")
    parser.add_argument("--sequences", type=at_least(1), nargs="*", default=[1, 16, 64], help="default: 1 16 64")
    parser.add_argument("--context", type=at_least(1), default=64, help="ids of a prompt; default: %(default)s")
    parser.add_argument("--new", type=at_least(1), default=32, help="tokens written; default: %(default)s")
    parser.add_argument("--runs", type=at_least(1), default=3, help="of which the median counts; default: %(default)s")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="default: %(default)s")
    parser.add_argument(
        "--reference", metavar="PATH", help="transformers loads this one instead, to hold tokens against"
    )
    add_vllm(parser)
    parser.add_argument("--blocks", type=at_least(1), help="of the bundled text, for perplexity; default: none")
    arguments = parse(parser, argv)
    if "llama.cpp" in arguments.engines and arguments.vocabulary is None:
        parser.error("--vocabulary: llama.cpp needs one; or leave llama.cpp out of --engines")
    if arguments.clock == "process" and "vllm" in arguments.engines:
        parser.error("--clock: vLLM's work is done in other processes, whose time does not count; measure it by wall")
    if arguments.dummy and arguments.engines != ["vllm"]:
        parser.error("--dummy: only vLLM fills in weights; pass --engines vllm")
    timer = Timer(arguments.device, 7) if arguments.device.type == "cuda" else None
    session = Session(arguments, MODULE, argv, COLUMNS, timer)
    run(arguments, session)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
