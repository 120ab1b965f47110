"""The table as README shows it: `python -m hywia_kernels.arch.support` prints it, and writes it with a file's name."""

from __future__ import annotations

import sys
from pathlib import Path

from .configs import checks_of
from .language import Architecture
from .table import TABLE

__all__ = ["BEGIN", "END", "markdown", "written"]

BEGIN, END = "<!-- support table: python -m hywia_kernels.arch.support README.md -->", "<!-- end of support table -->"


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
        units = [units[0], "channels of experts", "experts"]
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


def written(text: str) -> str:
    """A text in which the table between BEGIN and END has been replaced by that of the present entries.

    Raises:
        ValueError: the marks are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected a text with {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(written(path.read_text()))
    else:
        print(markdown())
