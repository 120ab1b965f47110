"""Formats of serving software that hold layers of different widths exactly."""

from .decilm import write_decilm
from .gguf import write_gguf

__all__ = ["write_decilm", "write_gguf"]
