"""Checkpoints in the engines that serve them: whether they load, whether they write the same, how fast.

    python -m benchmarks.bench_served smollm2 P20 P50 --vocabulary smollm2 --formats F16 Q8_0 Q4_K_M --blocks 40
    python -m benchmarks.bench_served DENSE P20 P50 --engines transformers vllm --context 512 --new 256

A row a checkpoint, engine, format and number of sequences; an engine that does not load it has one row with its words
in `error`. Needs the engines' packages: `vllm`; for llama.cpp `gguf`, `xllamacpp` (its server) and `cyllama` (its
quantiser, and the logits of perplexities), and `--vocabulary`, a GGUF file of the model before pruning. llama.cpp runs
on the CPU here, vLLM on GPUs.

Agreement: eight prompts continued greedily by 24 tokens, against transformers in float32 with the weights in `--dtype`,
in which transformers and vLLM run, and from which llama.cpp's quantiser makes its formats, F16 as well. `same` counts
tokens before the parting, of `asked`; `gap` is the largest difference of the logits of transformers' token and the
engine's where they part, by transformers.

Speed: `sequences` prompts of `context` random ids at once. `tokens_per_second` are those written, the prompts' time
included; `first_ms` is the time of the same with one token; both medians of `runs` after one that does not count.
`--clock process` counts the process's own time, for a machine that is not quiet; `load` is the machine's load average.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hywia_kernels as hk
from hywia_kernels.checkpoint.gguf import write_gguf
from hywia_kernels.checkpoint.sources import located
from hywia_kernels.evaluation import blocks
from hywia_kernels.method.reading import bundled_text
from hywia_kernels.method.writing import prompt_tokens

from . import gguf_files, memory
from .served_engines import Engine, LlamaCpp, RefusedError, Transformers, Vllm
from .session import Session, add_dtype, argv_of, at_least, common_arguments, make_parser, parse

MODULE = "benchmarks.bench_served"
COLUMNS = {
    **dict.fromkeys(("checkpoint", "engine", "version", "format", "types", "error"), str),
    **dict.fromkeys(("tensor_parallel", "parameters", "file_bytes", "asked", "same", "parted"), int),
    "gap": float,
    **dict.fromkeys(("sequences", "context", "new"), int),
    "clock": str,
    **dict.fromkeys(("first_ms", "tokens_per_second"), float),
    **dict.fromkeys(("runs", "memory_bytes", "kv_tokens", "blocks"), int),
    **dict.fromkeys(("perplexity", "load"), float),
}
ENGINES = ("transformers", "llama.cpp", "vllm")
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "The three primary colours are",
    "In 1969 two astronauts",
    "To bake bread you need",
    "Alice was beginning to get very tired of",
)
NEW = 24  # tokens that engines have to agree on


@dataclass(frozen=True)
class Agreement:
    """What an engine wrote against transformers; as the columns of these names."""

    asked: int
    same: int
    parted: int
    gap: float | None


class Reference:
    """transformers in float32, with the weights rounded to a dtype before.

    Attributes:
        prompts: the ids of `PROMPTS`. tokens: what it writes behind each.
    """

    def __init__(self, path: str, dtype: str, device: torch.device, new: int = NEW):
        held = Transformers(path, device, dtype)
        held.model.float()
        self.model, self.tokenizer = held.model, held.tokenizer
        self.prompts = [prompt_tokens(self.model, self.tokenizer, text)[0].tolist() for text in PROMPTS]
        self.tokens = held.write(self.prompts, new)
        self.model.cpu()  # an engine takes the whole GPU
        memory.free(device)

    def against(self, written: Sequence[Sequence[int]]) -> Agreement:
        """How far an engine's tokens go with these."""
        same, gaps = 0, []
        for prompt, own, other in zip(self.prompts, self.tokens, written, strict=True):
            place = next((i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b), len(own))
            same += place
            if place < len(own):
                logits = self._logits([*prompt, *own[:place]])
                gaps.append(float(logits[own[place]] - logits[other[place]]))
        return Agreement(sum(map(len, self.tokens)), same, len(gaps), max(gaps, default=None))

    @torch.no_grad()
    def _logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Of the token behind these, `[vocabulary]`."""
        return self.model(torch.tensor([ids])).logits[0, -1]


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


class _Checkpoint:
    """One checkpoint's rows; its GGUF files lie in `folder`."""

    def __init__(self, path: str, arguments: Any, session: Session, folder: Path):
        self.path, self.arguments, self.session, self.folder = path, arguments, session, folder
        self.length = max(arguments.context + arguments.new, 64 + NEW)
        self.most = max([len(PROMPTS), *arguments.sequences])

    def run(self) -> None:
        given = self.arguments
        self.reference = Reference(self.path, given.dtype, given.device)
        model = self.reference.model
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.text = blocks(self.reference.tokenizer, bundled_text(), max_blocks=given.blocks) if given.blocks else None
        self.known = {"checkpoint": self.path, "parameters": sum(p.numel() for p in model.parameters())}
        for engine in given.engines:
            if engine == "transformers":
                self.measure(engine, given.dtype, lambda: Transformers(self.path, given.device, given.dtype))
            elif engine == "vllm":
                self.measure(engine, given.dtype, self.vllm)
            else:
                self.llama_cpp()

    def vllm(self) -> Vllm:
        return Vllm(self.path, self.most, self.length, self.arguments.tensor_parallel)

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
            agreed = self.reference.against(loaded.write(self.reference.prompts, NEW))
            told |= {"version": loaded.version, **vars(agreed)}
            if self.text is not None and engine != "vllm":  # it hands out no logits of a whole vocabulary
                told |= {"blocks": len(self.text), "perplexity": self.perplexity(loaded, file)}
            sizes = (given.context, given.new, self.vocabulary, given.runs, given.clock)
            for sequences in given.sequences:
                self.add(engine, form, **told, **speed(loaded, sequences, *sizes))
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
        agreed = f"{row.same} of {row.asked} tokens as transformers{gap}"
        rate = "" if row.sequences is None else f"{row.sequences:>4} x {row.tokens_per_second:,.1f} tokens/s"
        text = "" if row.perplexity is None else f"perplexity {row.perplexity:.2f}"
        print(f"{self.path} {engine} {form}: {agreed}; {rate} {text}", flush=True)


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
    parser.add_argument("--tensor-parallel", type=at_least(1), default=1, help="GPUs of vLLM; default: %(default)s")
    parser.add_argument("--blocks", type=at_least(1), help="of the bundled text, for perplexity; default: none")
    arguments = parse(parser, argv)
    if "llama.cpp" in arguments.engines and arguments.vocabulary is None:
        parser.error("--vocabulary: llama.cpp needs one; or leave llama.cpp out of --engines")
    if arguments.clock == "process" and "vllm" in arguments.engines:
        parser.error("--clock: vLLM's work is done in other processes, whose time does not count; measure it by wall")
    session = Session(arguments, MODULE, argv, COLUMNS)
    run(arguments, session)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
