"""Whether an engine writes what transformers writes: eight prompts, continued greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hywia_kernels.method.writing import prompt_tokens

from . import memory
from .served_engines import Transformers

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
