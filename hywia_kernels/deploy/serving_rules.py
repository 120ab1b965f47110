"""Rules of serving software on head counts, KV groups and widths, by name; the planner keeps to them.

Each rule was read in its project's source (vLLM 0.23.0, llama.cpp of 2026, TGI of January 2026). What vLLM loads on one
device was tried, family by family (`benchmarks/test_vllm.py`); nothing was on several.

* vLLM 0.23.0, `model_executor/models/llama.py`: query heads are a multiple of the tensor-parallel size; KV heads are a
  multiple of it, or it of them; every dimension that is sharded is divided by it: channels, and the vocabulary after
  padding to a multiple of 64 (the hidden size is not sharded).
* TGI, `custom_modeling/flash_*_modeling.py`: query heads, KV heads and sharded dimensions are divided by the number of
  shards. Its Llama code takes hidden_size / num_attention_heads for the size of a head whatever `head_dim` says, so a
  Llama with fewer heads is stored as Mistral, whose code reads `head_dim` (`checkpoint.saving`).
* llama.cpp, `convert_hf_to_gguf.py` and the server: any width converts and runs, as long as KV heads divide query
  heads, which whole groups always do: no rule. Its quantiser takes rows in blocks of 32 (Q4_0, Q8_0) or 256 (K-quants).
  It refuses Q4_0 and Q8_0 to a model with a row of another length. Q4_K_M takes every model: a matrix with other rows
  becomes Q5_0 or Q8_0 where they are multiples of 32, and stays F16 where they are not. So it did in llama.cpp b9190
  (`benchmarks/test_quantiser.py`). The file of floats is served in any case, so that whole blocks of 32 are a wish
  among the defaults: of SmolLM2 they move the share that is removed by at most 0.002 and no ratio of 0.1 to 0.6 is out
  of reach, while blocks of 256 end at 0.4 on most targets and stay a rule by name. All speak of the rows that a cut
  shortens; others have the hidden size, which no cut changes.

A server does not take a model that breaks a hard rule, so hard rules hold for what is not cut as well. All of them are
about sharing a model between GPUs: a model for one GPU breaks none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..errors import HywiaError, UsageError
from ..types import Group

__all__ = [
    "DEFAULT",
    "SERVERS",
    "VLLM_GUESSES_HEADS",
    "Constraint",
    "allowed",
    "check_untouched",
    "check_vocabulary",
    "constraints",
    "heads_note",
    "pattern_note",
]

SERVERS = ("vllm", "tgi", "llama.cpp")
DEFAULT = SERVERS
# Families whose code in vLLM takes hidden_size / num_attention_heads for the size of a head, whatever `head_dim` says:
# with fewer heads it does not load them (tried in 0.23.0). It loads all but Phi by transformers' code of the family.
VLLM_GUESSES_HEADS = ("qwen2", "olmo2", "olmo3", "phi", "starcoder2")
_VLLM_REFUSES = ("phi",)
_BLOCK = 32  # numbers of a row that llama.cpp's Q4_0 and Q8_0 share a scale for
_VLLM_PADDING = 64  # rows of the embedding


@dataclass(frozen=True)
class Constraint:
    """One rule of a server.

    Attributes:
        name: `server.rule`.
        says: the rule in words.
        admits: whether a group may keep that many units.
        hard: the server refuses a model that breaks the rule; a rule that is not hard may be broken by a width that is
            not cut.
        wish: it is kept where a request can be met with it, and dropped where not.
    """

    name: str
    says: str
    admits: Callable[[Group, int], bool]
    hard: bool = True
    wish: bool = False


def _heads(group: Group, units: int) -> int:
    """Query heads of `units` KV groups: in each, as many as one unit's rows of k go into its columns of o."""
    per_unit = max(1, group.members[-1].group_size // group.members[1].group_size) if len(group.members) > 2 else 1
    return units * per_unit


def _divisible(kind: str, by: int, size: Callable[[Group, int], int]) -> Callable[[Group, int], bool]:
    return lambda group, units: group.kind != kind or size(group, units) % by == 0


def _units(_: Group, units: int) -> int:
    return units


def _whole_rows(size: int) -> Callable[[Group, int], bool]:
    return lambda group, units: _row(group, units) % size == 0


def _row(group: Group, units: int) -> int:
    """Length of the rows of the matrix that takes the units, which quantisers cut into blocks."""
    return units * group.members[-1].group_size


def _fits_blocks(group: Group, units: int) -> bool:
    """Whether the rows that a cut leaves are whole blocks, in a model whose other rows, of the hidden size, are."""
    hidden = group.unit_parameters // sum(m.group_size for m in group.members)  # biases are fewer than rows and columns
    return hidden % _BLOCK != 0 or _row(group, units) % _BLOCK == 0


def constraints(serve: Sequence[str] = DEFAULT, tensor_parallel: int = 1) -> tuple[Constraint, ...]:
    """The rules of servers, and others by name ("llama.cpp.blocks", "llama.cpp.k_quants", "vllm.marlin").

    For one GPU no hard rules are given, since a model cannot break them there. "llama.cpp" wishes for whole blocks,
    "llama.cpp.blocks" insists on them.

    Args:
        serve: names from `SERVERS`, or of single rules. tensor_parallel: how many GPUs share the model.

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
    )
    # GPTQ's and AWQ's kernel ("marlin"): a shard's inputs are multiples of 128, its outputs of 64.
    blocks = (
        ("llama.cpp.blocks", _BLOCK, ", or llama.cpp's quantiser refuses Q4_0 and Q8_0"),
        ("llama.cpp.k_quants", 256, ", or its K-quants store them in larger types"),
        ("vllm.marlin", 128 * n, ""),
    )
    extra = tuple(
        Constraint(name, f"rows of down and o are multiples of {size}{otherwise}", _whole_rows(size), hard=False)
        for name, size, otherwise in blocks
    )
    wished = replace(extra[0], admits=_fits_blocks, wish=True)
    chosen: list[Constraint] = []
    for name in serve:
        if name == "llama.cpp" and wished.name not in serve:
            chosen.append(wished)
        named = [c for c in known if c.name == name or c.name.rpartition(".")[0] == name]
        named += [c for c in extra if c.name == name]
        if not named and name not in SERVERS:
            names = [*SERVERS, *(c.name for c in extra)]
            raise UsageError(f"serve: expected some of {', '.join(names)}, got {name!r}")
        chosen += [c for c in named if c not in chosen and (n > 1 or not c.hard)]
    return tuple(chosen)


def allowed(rules: Sequence[Constraint]) -> Callable[[Group, list[int]], list[int]]:
    """A limit for `selection.plan`: the widths that all rules admit. The present width, which is not a cut, has to meet
    the hard rules alone."""

    def admitted(group: Group, width: int) -> bool:
        return all(r.admits(group, width) for r in rules if r.hard or width != group.units)

    return lambda group, widths: [w for w in widths if admitted(group, w)]


def check_untouched(rules: Sequence[Constraint], groups: Sequence[Group], cut: Callable[[Group], bool]) -> None:
    """Check the hard rules on a model's groups before any is cut.

    Args:
        rules: as `constraints` gives them. groups: all groups of the model. cut: tells whether a group may lose units.

    Raises:
        HywiaError: a group that stays as it is breaks a rule, or no width of one that is cut meets them all.
    """
    hard = [r for r in rules if r.hard]
    for group in groups:
        broken = [r for r in hard if not r.admits(group, group.units)]
        if not broken:
            continue
        if not cut(group):
            raise HywiaError(
                f"serve: {_told(broken)}, but {group.name} keeps its {_counted(group, group.units)}; let {group.kind} "
                "be cut as well, pass another --tensor-parallel, or leave the server out of --serve"
            )
        if not any(all(r.admits(group, w) for r in hard) for w in range(group.min_units, group.units)):
            raise HywiaError(
                f"serve: {_told(broken)}, which {group.name} cannot meet with at most {_counted(group, group.units)}; "
                "pass another --tensor-parallel, or leave the server out of --serve"
            )


def check_vocabulary(serve: Sequence[str], tensor_parallel: int, vocabulary: int) -> None:
    """Check the rule about the vocabulary, which is never cut.

    Raises:
        UsageError: vLLM could not share out a vocabulary of so many rows.
    """
    padded = -(-vocabulary // _VLLM_PADDING) * _VLLM_PADDING
    if any(name.partition(".")[0] == "vllm" for name in serve) and padded % tensor_parallel:
        raise UsageError(
            f"serve: vllm pads the vocabulary of {vocabulary} to {padded}, which is no multiple of {tensor_parallel} "
            "GPUs; pass another --tensor-parallel, or leave vllm out of --serve"
        )


def heads_note(serve: Sequence[str], family: str, cut: bool) -> str | None:
    """What to know of a model that vLLM does not load with its own code of the family; None where it does.

    Args:
        serve: as `constraints` takes it. family: the config's `model_type`. cut: whether any layer loses heads.
    """
    named = any(name.partition(".")[0] == "vllm" for name in serve)
    if not named or not cut or family not in VLLM_GUESSES_HEADS:
        return None
    way = "does not load this model" if family in _VLLM_REFUSES else "loads this model with --model-impl transformers"
    return (
        f"vLLM (0.23) guesses the size of a head of {family} from the number of heads, and {way}; "
        "--units mlp keeps the heads"
    )


def pattern_note(serve: Sequence[str], types: Sequence[str] | None, keep: Sequence[int]) -> str | None:
    """What to know of a model whose layers differ in their attention once some have gone; None where it is nothing.

    llama.cpp has no list of such types for most families (Gemma 2 and 3): it counts, every second or sixth layer.

    Args:
        serve: as `constraints` takes it. types: of each layer before the cut, as the config lists them; None: no list.
        keep: indices of the layers that stay.
    """
    named = any(name.partition(".")[0] == "llama" for name in serve)
    if types is None or not named or [types[i] for i in keep] == list(types[: len(keep)]):
        return None
    return (
        "the attention's types no longer come in the family's order, which llama.cpp counts by instead of reading "
        "config.layer_types: check there what the converted model says; transformers goes by the list"
    )


def _told(rules: Sequence[Constraint]) -> str:
    """Rules by name and in words, for messages."""
    return " and ".join(f"{r.name} ({r.says})" for r in rules)


def _counted(group: Group, units: int) -> str:
    if group.kind != "attention":
        return f"{units} {group.unit}s"
    return f"{units} KV heads and {_heads(group, units)} query heads"
