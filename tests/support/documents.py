"""The documents as text: their fenced blocks, what those need, and the commands in them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
_FENCE = re.compile(r"^(?:<!-- (needs|output:) ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(hywia [^`]*\bMODEL\b[^`]*|torchrun [^`]*)`")


def _installed(*modules: str) -> Callable[[], bool]:
    return lambda: all(importlib.util.find_spec(module) is not None for module in modules)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# WHAT of `<!-- needs WHAT -->` -> whether it is here. Blocks that need what no test should use are never run.
NEEDS: dict[str, Callable[[], bool]] = {
    "recover": _installed("accelerate", "peft"),
    "gguf": _installed("gguf"),
    "torch-pruning": _installed("torch_pruning"),
    "LLM-Pruner": lambda: False,  # tests/integrations/test_llm_pruner_repository.py runs its scripts
    "GPU": _cuda,
    "several GPUs": lambda: False,  # tests/scale has several processes
    "the hub": lambda: False,
    "minutes": lambda: False,
    "vLLM": lambda: False,
    "llama.cpp": lambda: False,
    "lm-eval": lambda: False,
}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: behind the opening fence; "" for commands.
        needs: what must be there for it to run. output_of: the command whose output it shows.
    """

    language: str
    text: str
    needs: tuple[str, ...] = ()
    output_of: str = ""

    @property
    def commands(self) -> list[str]:
        """Lines of a block of commands, without comments and with their continuations."""
        joined = self.text.replace("\\\n", " ")
        lines = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in joined.splitlines())
        return [line for line in lines if line]

    @property
    def missing(self) -> list[str]:
        return [need for need in self.needs if not NEEDS[need]()]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a document."""
    found = []
    for kind, words, language, body in _FENCE.findall(text):
        needs = tuple(words.split(", ")) if kind == "needs" else ()
        found.append(Block(language, body, needs, words if kind == "output:" else ""))
    return found


def inline(text: str) -> list[str]:
    """Whole commands within sentences and tables."""
    return _INLINE.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))
