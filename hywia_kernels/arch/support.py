"""The table of families and those beside it, as docs/models.md shows them.

`python -m hywia_kernels.arch.support` prints both, and writes those that a named file has marks for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from . import observed
from .configs import checks_of
from .language import Architecture
from .table import TABLE

__all__ = ["BEGIN", "END", "derived_markdown", "markdown", "written"]

BEGIN = "<!-- support table: python -m hywia_kernels.arch.support docs/models.md -->"
END = "<!-- end of support table -->"
DERIVED_BEGIN = "<!-- derived families: python -m hywia_kernels.arch.support docs/models.md -->"
DERIVED_END = "<!-- end of derived families -->"


def _config_class(entry: Architecture):
    from transformers import AutoConfig

    return type(AutoConfig.for_model(entry.model_types[0]).get_text_config())


def _divides(entry: Architecture) -> bool:
    """Whether the config wants its head count to divide the hidden size."""
    return "validate_architecture" in checks_of(_config_class(entry))


def _is_grouped(entry: Architecture) -> bool:
    return bool(entry.attention.kv_heads_field)


def _units(entry: Architecture) -> str:
    units = ["KV groups" if _is_grouped(entry) else "heads", "channels"]
    if entry.experts is not None:
        units = [units[0], "channels of experts", *(["experts"] if entry.experts.router else [])]
    return ", ".join(units)


def _not_stock(entry: Architecture) -> str:
    """Which cuts no stock config can describe although they are the same in every layer."""
    cuts = []
    if not entry.attention.free_head_dim:
        cuts.append("heads (the config makes their size of their count)")
    elif _divides(entry) and entry.stand_in is None:
        cuts.append("head counts that do not divide the hidden size")
    elif "validate_rope" in checks_of(_config_class(entry)):
        cuts.append("with longrope: other head counts (the config takes the length of its factors from them)")
    elif _divides(entry):
        needs = " or ".join(f"`{field}`" for field, value in entry.stand_in_needs.items() if value is False)
        cuts.append(f"with {needs}: head counts that do not divide the hidden size")
    if not entry.mlp.width_field:
        cuts.append("channels (always four times the hidden size)")
    return "; ".join(cuts) or "–"


def markdown() -> str:
    """One row per entry: models, `model_type`, units, and what a stock config cannot describe."""
    rows = ["| models | `model_type` | units | uniform cuts no stock config describes |"]
    rows.append("| --- | --- | --- | --- |")
    for entry in TABLE:
        types = ", ".join(f"`{name}`" for name in entry.model_types)
        rows.append(f"| {entry.title} | {types} | {_units(entry)} | {_not_stock(entry)} |")
    return "\n".join(rows)


def derived_markdown() -> str:
    """The families that the table lacks, by what the tests saw of them: derived, MLP only, refused."""
    rows = ["| state | `model_type` |", "| --- | --- |"]
    by_kinds: dict[str, list[str]] = {}
    for name, kinds in observed.DERIVED.items():
        state = "derived where the config says `is_decoder`" if name in observed.DECODERS else "derived"
        by_kinds.setdefault(f"{state}: {_KINDS[tuple(kinds)]}", []).append(name)
    for state, names in by_kinds.items():
        rows.append(f"| {state} | {_names(names)} |")
    rows.append(f"| MLP only (`--units mlp`) | {_names(observed.MLP_ONLY)} |")
    rows.append(f"| language part derived: heads, channels | {_names(observed.IMAGES)} |")
    by_reason: dict[str, list[str]] = {}
    for name, reason in observed.REFUSED.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        rows.append(f"| refused: {reason} | {_names(names)} |")
    return "\n".join(rows)


_KINDS = {
    ("mlp", "attention"): "heads, channels",
    ("mlp", "attention", "experts"): "heads, channels, experts",
    ("mlp", "experts"): "channels, experts",
    ("attention",): "heads",
}


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def written(text: str) -> str:
    """A text in which the tables between marks have been replaced by those of the present entries.

    Raises:
        ValueError: there are no marks.
    """
    found = False
    for begin, end, table in ((BEGIN, END, markdown), (DERIVED_BEGIN, DERIVED_END, derived_markdown)):
        before, first, rest = text.partition(begin)
        _, last, after = rest.partition(end)
        if first and last:
            text, found = f"{before}{begin}\n{table()}\n{end}{after}", True
    if not found:
        raise ValueError(f"expected a text with {BEGIN} and {END}")
    return text


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(written(path.read_text()))
    else:
        print(markdown(), derived_markdown(), sep="\n\n")
