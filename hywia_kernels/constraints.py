"""Rules of serving software on head counts, KV groups and widths, by name; the planner keeps to them.

Each rule was read in its project's source (vLLM and llama.cpp of 2026, TGI of January 2026):

* vLLM, `model_executor/models/llama.py`: query heads are a multiple of the tensor-parallel size; KV heads are a
  multiple of it, or it of them; every dimension that is sharded is divided by it.
* TGI, `custom_modeling/flash_*_modeling.py`: query heads, KV heads and sharded dimensions are divided by the number of
  shards. Its Llama code takes hidden_size / num_attention_heads for the size of a head whatever `head_dim` says, so a
  Llama with fewer heads is stored as Mistral, whose code reads `head_dim` (`export.stock_config`).
* llama.cpp, `convert_hf_to_gguf.py` and the quantiser: any width converts, as long as KV heads divide query heads. Rows
  are quantised in blocks of 32 (Q4_0, Q8_0, ...) or 256 (K-quants); others fall back to larger types. Those are rules
  by name, no refusals, and not among the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import UsageError
from .types import Group

__all__ = ["DEFAULT", "SERVERS", "Constraint", "allowed", "constraints"]

SERVERS = ("vllm", "tgi", "llama.cpp")
DEFAULT = SERVERS


@dataclass(frozen=True)
class Constraint:
    """One rule.

    Attributes:
        name: `server.rule`.
        says: the rule in words.
        admits: whether a group may keep that many units.
    """

    name: str
    says: str
    admits: Callable[[Group, int], bool]


def _heads(group: Group, units: int) -> int:
    """Query heads of `units` KV groups: rows of o over rows of k, both a unit's."""
    per_unit = max(1, group.members[-1].group_size // group.members[1].group_size) if len(group.members) > 2 else 1
    return units * per_unit


def _divisible(kind: str, by: int, size: Callable[[Group, int], int]) -> Callable[[Group, int], bool]:
    return lambda group, units: group.kind != kind or size(group, units) % by == 0


def _units(_: Group, units: int) -> int:
    return units


def _row(group: Group, units: int) -> int:
    """Length of the rows of the matrix that takes the units: what is quantised in blocks."""
    return units * group.members[-1].group_size


def constraints(serve: Sequence[str] = DEFAULT, tensor_parallel: int = 1) -> tuple[Constraint, ...]:
    """The rules of servers, and others by name ("llama.cpp.blocks", "llama.cpp.k_quants", "vllm.marlin").

    Args:
        serve: of `SERVERS`, or single rules' names. tensor_parallel: how many GPUs share the model.

    Raises:
        UsageError: an unknown name, or fewer than one GPU.
    """
    if tensor_parallel < 1:
        raise UsageError(f"tensor_parallel: expected at least 1, got {tensor_parallel}")
    n = tensor_parallel
    known = (
        Constraint("vllm.heads", f"query heads are a multiple of {n}", _divisible("attention", n, _heads)),
        Constraint(
            "vllm.kv_heads",
            f"KV heads are a multiple of {n}, or divide it",
            lambda g, u: g.kind != "attention" or u % n == 0 or n % u == 0,
        ),
        Constraint("vllm.width", f"channels are a multiple of {n}", _divisible("mlp", n, _units)),
        Constraint("tgi.heads", f"query heads are a multiple of {n}", _divisible("attention", n, _heads)),
        Constraint("tgi.kv_heads", f"KV heads are a multiple of {n}", _divisible("attention", n, _units)),
        Constraint("tgi.width", f"channels are a multiple of {n}", _divisible("mlp", n, _units)),
        Constraint(
            "llama.cpp.heads",
            "KV heads divide query heads",
            lambda g, u: g.kind != "attention" or _heads(g, u) % u == 0,
        ),
    )
    extra = (
        Constraint("llama.cpp.blocks", "rows of down and o are multiples of 32", lambda g, u: _row(g, u) % 32 == 0),
        Constraint("llama.cpp.k_quants", "rows of down and o are multiples of 256", lambda g, u: _row(g, u) % 256 == 0),
        # GPTQ's and AWQ's kernel: a shard's inputs are multiples of 128, its outputs of 64.
        Constraint(
            "vllm.marlin", f"rows of down and o are multiples of {128 * n}", lambda g, u: _row(g, u) % (128 * n) == 0
        ),
    )
    chosen: list[Constraint] = []
    for name in serve:
        found = [c for c in known if c.name == name or c.name.rpartition(".")[0] == name]
        found += [c for c in extra if c.name == name]
        if not found:
            names = [*SERVERS, *(c.name for c in extra)]
            raise UsageError(f"serve: expected some of {', '.join(names)}, got {name!r}")
        chosen += [c for c in found if c not in chosen]
    return tuple(chosen)


def allowed(rules: Sequence[Constraint]) -> Callable[[Group, list[int]], list[int]]:
    """A limit for `selection.plan`: the widths that all rules admit, and the present one, which is not a cut."""
    return lambda group, widths: [w for w in widths if w == group.units or all(r.admits(group, w) for r in rules)]
