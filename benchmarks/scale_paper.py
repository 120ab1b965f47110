"""What scoring models larger than a GPU takes on paper: formulas, with their inputs stated here.

Seconds are the larger of two that overlap. The compute is that of the same tokens on GPUs that hold the model: the
seconds of a token and a parameter that the measured pass over LLaMA-7B's shapes took, times the tokens, times the
parameters that a token meets, over the GPUs. The transfers are twice the layers' bytes over the rate at which a
process gets them: from files it moves all of them over its own link, whatever the number of processes, and the
processes of a host read a file once; what they hold together in the host's memory each moves a part of, and gathers the
others' over the link between GPUs, one after the other here.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import models

LINK = 50e9  # bytes a second from pinned memory to a GPU over PCIe 5, assumed
NVLINK = 450e9  # bytes a second that a GPU gets from the others of a host, assumed
DISK = 7e9  # bytes a second of one host's NVMe, assumed
ELEMENT = 2  # bytes of a number in bfloat16
LENGTH = 128  # tokens of a sample


@dataclass(frozen=True)
class Model:
    """A published model by its config.

    Attributes:
        name: as published. layers, hidden, vocabulary: numbers of.
        layer: parameters of the largest layer. all_layers: of all of them.
        met: parameters that a token meets in the layers; fewer than there are in a mixture of experts.
    """

    name: str
    layers: int
    hidden: int
    vocabulary: int
    layer: int
    all_layers: int
    met: int


@dataclass(frozen=True)
class Case:
    """A model on machines.

    Attributes:
        gpus: in all, one process each. hosts: of them. weights: where they stay, "host" or "files".
    """

    model: Model
    gpus: int
    hosts: int
    weights: str
    samples: int


@dataclass(frozen=True)
class Cost:
    """Seconds of a scoring, and bytes of a process: on the GPU for weights, of hidden states that are kept; and of a
    host for weights."""

    compute: float
    transfer: float
    weights: float
    hidden: float
    host: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.transfer)


def dense(name: str, hidden: int, wide: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> Model:
    """A LLaMA: four projections of attention, three of the MLP, two norms."""
    kv = hidden // heads * kv_heads
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * wide + 2 * hidden
    return Model(name, layers, hidden, vocabulary, layer, layers * layer, layers * layer)


def shaped(name: str, shape: str) -> Model:
    """One of the benchmarks' shapes."""
    of = models.SHAPES[shape]
    return dense(
        name,
        of["hidden_size"],
        of["intermediate_size"],
        of["num_hidden_layers"],
        of["num_attention_heads"],
        of["num_key_value_heads"],
        of["vocab_size"],
    )


LLAMA_7B, LLAMA_70B = shaped("LLaMA-7B", "7b"), shaped("LLaMA-70B", "70b")
LLAMA_405B = dense("LLaMA-3.1-405B", 16384, 53248, 126, 128, 8, 128256)
# 671 billion parameters of which a token meets 37, as published; embedding and head are two times 129,280 · 7,168 of
# them. The largest layer holds 257 experts of three matrices 2,048 · 7,168, and attention of 187 million.
_OUTSIDE = 2 * 129280 * 7168
DEEPSEEK_671B = Model(
    "DeepSeek-V3",
    layers=61,
    hidden=7168,
    vocabulary=129280,
    layer=257 * 3 * 2048 * 7168 + 187_000_000,
    all_layers=671_000_000_000 - _OUTSIDE,
    met=37_000_000_000 - _OUTSIDE,
)
CASES = (
    *(Case(LLAMA_70B, 1, 1, weights, samples) for weights in ("host", "files") for samples in (96, 1024)),
    *(Case(LLAMA_70B, 8, 1, weights, samples) for weights in ("host", "files") for samples in (96, 1024)),
    *(Case(LLAMA_405B, 1, 1, weights, samples) for weights in ("host", "files") for samples in (96, 1024)),
    *(Case(DEEPSEEK_671B, 32, 4, weights, samples) for weights in ("host", "files") for samples in (96, 1024)),
)


def rate_of(seconds: float, samples: int, length: int) -> float:
    """Seconds of a token and a parameter, by a measured pass over LLaMA-7B's shapes, its head included."""
    met = LLAMA_7B.met + LLAMA_7B.vocabulary * LLAMA_7B.hidden
    return seconds / (samples * length * met)


def cost(case: Case, rate: float) -> Cost:
    """What a case takes.

    Args:
        rate: of `rate_of`.
    """
    of, tokens = case.model, case.samples * LENGTH
    outside = of.vocabulary * of.hidden
    moved, mates, held = 2 * of.all_layers * ELEMENT, case.gpus // case.hosts, case.weights == "host"
    together = moved / mates / LINK + moved * (mates - 1) / mates / NVLINK
    parts = 1 / mates if held and mates > 1 else 0.0
    return Cost(
        compute=tokens * (of.met + outside) * rate / case.gpus,
        transfer=together if held else moved / min(LINK, DISK),
        weights=(2 * outside + 2 * of.layer * (1 + parts)) * ELEMENT,
        hidden=tokens / case.gpus * of.hidden * ELEMENT * (of.layers + 2),
        host=of.all_layers * ELEMENT if held else 2 * of.layer * ELEMENT,
    )
