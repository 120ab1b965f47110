"""What each setting may be, and the defaults that functions, recipes and commands share: said once, here.

Imports no package, so that the command line can show its help without loading torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = [
    "BACKENDS",
    "BLEND",
    "BLOCK",
    "CRITERIA",
    "CUTS",
    "DEFAULT_KINDS",
    "DTYPES",
    "ENGINES",
    "FUSION",
    "FUSIONS",
    "GROUP_KINDS",
    "HEAD_RANKINGS",
    "HOLDS",
    "JUDGED_SAMPLES",
    "KINDS",
    "LAYER_PASSES",
    "LAYOUTS",
    "LEARNED",
    "LEARNING_BATCH",
    "MEMORY",
    "ORDERS",
    "PRICE_SAMPLES",
    "RANK_TIMEOUT",
    "RIDGE",
    "SAMPLES",
    "SEARCHES",
    "SELF",
    "SEQ_LEN",
    "STATE_SECONDS",
    "STEPS",
    "STREAMED",
    "TUNES",
    "WEIGHTS",
    "ByDevice",
]

Value = TypeVar("Value")
_LARGE_PARAMETERS = 1e9


@dataclass(frozen=True)
class ByDevice(Generic[Value]):
    """A default that a CPU wants otherwise than accelerators do, and these for models of more than a billion parameters
    otherwise than for smaller ones (`large`; None: no)."""

    cpu: Value
    gpu: Value
    large: Value | None = None

    def on(self, device_type: str, parameters: int = 0) -> Value:
        """For a type of device, "cpu", "cuda" or another, and a model of so many parameters."""
        if device_type == "cpu":
            return self.cpu
        return self.gpu if self.large is None or parameters <= _LARGE_PARAMETERS else self.large


GROUP_KINDS = ("mlp", "attention", "experts")  # of units that lie on a layer's matrices
KINDS = (*GROUP_KINDS, "layers")  # of units
DEFAULT_KINDS = ("mlp", "attention")
LAYOUTS = ("uniform", "adaptive")
CRITERIA = ("hywia", "magnitude", "random")
FUSIONS = ("fine", "attention", "coarse", "mean", "product")
FUSION = "fine"  # where what stays is solved and trained anew, no blend of both grains keeps more (docs/recipe.md)
BLEND = "attention"  # of scores that decide alone, as those of the drop-in scorers
LEARNED = "learned"  # a fusion that only a whole recipe has: attention's scores, tuned by masks
ORDERS = ("first", "second", "mixed")
CUTS = ("auto", "memory", "files")  # where a plan is carried out
HEAD_RANKINGS = ("residual", "scores")
SEARCHES = ("none", "fast", "thorough")  # how the shares of kinds and layers are found: by estimate, or by trying some
ENGINES = ("auto", "fused", "autograd")
MEMORY = ("auto", "fast", "lean", "layerwise")
STREAMED = "streamed"  # a memory mode of the commands: one layer's weights at a time
WEIGHTS = ("auto", "device", "host", "files")  # where the weights stay in a streamed pass
RANK_TIMEOUT = 1800.0  # seconds that processes of one scoring wait for each other
BACKENDS = ("reference", "native", "triton", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TUNES = ("scales", "lora", "full")  # what a recovery trains
HOLDS = ("live", "8bit", "kept")  # how a recovery holds the dense model
SELF = "self"  # a source of text: the dense model writes it

SAMPLES = 96  # scored: on LLaMA-7B's shapes a pass over them takes less time than LLM-Pruner's over ten
SEQ_LEN = 128
BLOCK = 128  # tokens, of the text that perplexity is measured on: the papers' protocol
PRICE_SAMPLES = 16  # on which whole layers are left out, for their price: a mean over all of their tokens
STEPS = 50  # of mask learning
LEARNING_BATCH = 16  # samples that a step of mask learning reads
JUDGED_SAMPLES = {"none": 0, "fast": 32, "thorough": 64}  # that a search judges on, read behind those that are scored
STATE_SECONDS = 10.0  # between two states that a stopped run can go on from; shorter runs write none
# On two cores one of SmolLM2's takes as long as solving all of its matrices; of a large model one takes as long on a
# GPU as scoring, searching and solving together.
LAYER_PASSES = ByDevice(cpu=0, gpu=8, large=1)  # over a reconstruction's text, in which each layer is trained
RIDGE = 4.0  # of the reconstruction; chosen on SmolLM2
