"""Engines that serve a checkpoint, as `bench_served` drives them: token ids in, greedy token ids out.

Each needs its own library, imported on first use: `vllm`, or for llama.cpp `xllamacpp` (its server, in this process).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Protocol

import torch

import hywia_kernels as hk
from hywia_kernels.method import writing

from . import memory

_JSON = {"Content-Type": "application/json"}


class RefusedError(Exception):
    """The engine does not load the checkpoint, or does not run it; in its own words."""


class Engine(Protocol):
    """A checkpoint that is loaded; all sequences of a call have to fit at once."""

    version: str

    def write(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Continue prompts of any lengths by `new` tokens each, greedily, of those that end no text; the new ones."""

    def held(self) -> int | None:
        """Bytes in memory now that were not before it was loaded, at most so far where that is known."""

    def kv_tokens(self) -> int | None:
        """Tokens that the KV cache has room for; None where it grows."""

    def close(self) -> None: ...


class Transformers:
    """A directory, a GGUF file or a bundled name, by `hk.load`; prompts of one length run as a batch."""

    def __init__(self, path: str, device: torch.device, dtype: str = "auto"):
        self.version = metadata.version("transformers")
        memory.free(device)
        self._peak = memory.Peak(device, memory.resident() if device.type == "cpu" else 0)
        self._device = device
        self.model, self.tokenizer = hk.load(path, dtype=dtype, device=str(device))

    def write(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        written: list[list[int]] = []
        batches = [prompts] if len({len(p) for p in prompts}) == 1 else [[p] for p in prompts]
        for batch in batches:
            ids = torch.tensor(batch, device=self._device)
            written += self._greedy(ids, new)[:, ids.shape[1] :].tolist()
        return written

    def _greedy(self, ids: torch.Tensor, new: int) -> torch.Tensor:
        ends = sorted(writing._ends(self.model))
        settings = {"max_new_tokens": new, "min_new_tokens": new, "eos_token_id": ends or None, "pad_token_id": 0}
        return writing._generate(self.model, ids, do_sample=False, **settings)

    def held(self) -> int | None:
        return self._peak.bytes()

    def kv_tokens(self) -> int | None:
        return None

    def close(self) -> None:
        del self.model
        memory.free(self._device)


class LlamaCpp:
    """A GGUF file in llama.cpp's server, with a slot a sequence and continuous batching, on torch's number of threads.

    Args:
        path: the file. sequences: at once, at most. length: tokens of one, prompt included.
    """

    def __init__(self, path: Path, sequences: int, length: int):
        import xllamacpp

        self.version = metadata.version("xllamacpp")
        cpu = torch.device("cpu")
        memory.free(cpu)
        self._peak = memory.Peak(cpu, memory.resident())
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_parallel, settings.n_ctx = sequences, sequences * length
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        settings.port = 0  # a free one, of this machine alone
        settings.warmup = False
        settings.verbosity = 1  # errors
        self._tokens = sequences * length
        with tempfile.TemporaryFile() as said:
            try:
                with _errors_to(said):
                    self._server: Any = xllamacpp.Server(settings)
            except RuntimeError as error:
                raise RefusedError(_cause(said) or str(error)) from error

    def write(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        asked = {"prompt": [list(p) for p in prompts], "n_predict": new, "temperature": 0.0, "ignore_eos": True}
        body = json.dumps({**asked, "cache_prompt": False, "return_tokens": True}).encode()
        request = urllib.request.Request(f"{self._server.listening_address}/completion", body, _JSON)
        try:
            with urllib.request.urlopen(request) as answer:
                told = json.load(answer)
        except urllib.error.HTTPError as error:
            raise RefusedError(error.read().decode(errors="replace")) from error
        answers = told if isinstance(told, list) else [told]
        return [one["tokens"] for one in sorted(answers, key=lambda one: one["index"])]

    def held(self) -> int | None:
        return self._peak.bytes()

    def kv_tokens(self) -> int | None:
        return self._tokens

    def close(self) -> None:
        del self._server


@dataclass(frozen=True)
class VllmSettings:
    """Settings of vLLM that do not help a checkpoint to load.

    Attributes:
        tensor_parallel: GPUs that share the model.
        eager: without compiling and CUDA graphs, which take longer than a tiny model's tokens.
        share: of the GPU's memory, for weights and cache; None leaves vLLM's default.
        dummy: the directory has a config alone; vLLM fills in random weights, and there is no tokenizer.
        quantization: by which vLLM makes weights smaller as it loads them, as "fp8"; None: not.
        remote: code that the directory carries may run, without which vLLM does not read Nemotron-NAS blocks.
        implementation: "transformers" runs the family's own code with vLLM's attention; None: vLLM's own model.
        attention: of vLLM's attention backends, as "TRITON_ATTN"; None: the one that it takes by itself.
    """

    tensor_parallel: int = 1
    eager: bool = False
    share: float | None = None
    dummy: bool = False
    quantization: str | None = None
    remote: bool = False
    implementation: str | None = None
    attention: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Of `vllm.LLM`."""
        given: dict[str, Any] = {"tensor_parallel_size": self.tensor_parallel, "enforce_eager": self.eager}
        if self.share is not None:
            given["gpu_memory_utilization"] = self.share
        if self.dummy:
            given |= {"load_format": "dummy", "skip_tokenizer_init": True}
        if self.quantization is not None:
            given["quantization"] = self.quantization
        if self.remote:
            given["trust_remote_code"] = True
        if self.implementation is not None:
            given["model_impl"] = self.implementation
        if self.attention is not None:
            given["attention_backend"] = self.attention
        return given


class Vllm:
    """A directory in vLLM's offline engine (`vllm.LLM`, of 0.23).

    No option helps a checkpoint to load: what is set are sizes, the dtype, `settings`, and that prompts are not cached
    from one measurement to the next.
    """

    def __init__(self, path: str, sequences: int, length: int, dtype: str, settings: VllmSettings):
        import vllm

        self.version = vllm.__version__
        self._vllm = vllm
        self._before = self._used()
        try:
            self._model: Any = vllm.LLM(
                model=path,
                max_model_len=length,
                max_num_seqs=sequences,
                dtype=dtype,
                enable_prefix_caching=False,
                **settings.arguments(),
            )
        except Exception as error:  # of many kinds, by what it does not take
            self._release()
            raise RefusedError(str(error) or type(error).__name__) from error

    def write(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        # Below min_tokens no end of text is written; ignore_eos would write it and go on.
        sampling = self._vllm.SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, detokenize=False)
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = self._model.generate(asked, sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def held(self) -> int | None:
        return None if self._before is None else (self._used() or 0) - self._before

    def kv_tokens(self) -> int | None:
        cache = self._model.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size if cache.num_gpu_blocks else None

    def close(self) -> None:
        self._model.llm_engine.engine_core.shutdown()
        del self._model
        self._release()

    @staticmethod
    def _release() -> None:
        """What an engine of this process leaves (VLLM_ENABLE_V1_MULTIPROCESSING=0) would be in the next one's way."""
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()

    @staticmethod
    def _used() -> int | None:
        """Bytes in use on the current GPU by any process: the engine is one of its own; None without a GPU."""
        if not torch.cuda.is_available():
            return None
        free, whole = torch.cuda.mem_get_info()
        return whole - free


@contextmanager
def _errors_to(file: IO[bytes]) -> Iterator[None]:
    """What C code writes to the standard error meanwhile goes to a file."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _cause(file: IO[bytes]) -> str:
    """The first reason that llama.cpp's log gives for a model that it does not load; "" where it gives none."""
    file.seek(0)
    _, _, after = file.read().decode(errors="replace").partition("error loading model: ")
    return after.split("\n", 1)[0].strip()
