"""Formats of serving software that hold layers of different widths exactly.

`write_gguf` was run under llama.cpp; `write_decilm` follows vLLM's source and was not run under vLLM so far.
"""

from ..checkpoint.decilm import write_decilm
from ..checkpoint.gguf import write_gguf

__all__ = ["write_decilm", "write_gguf"]
