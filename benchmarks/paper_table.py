"""The table of `paper`: what was measured, and what is published beside it, by the share that was removed."""

from __future__ import annotations

from collections.abc import Sequence

from .published import Published
from .recoveries import NONE
from .rows import Row

HEAD = ("removed", "method", "recovery", "{0} 128", "{0} 2048", "{1} 128", "{1} 2048", "tasks", "GMACs", "prefill ms")
HEAD += ("decode ms", "from")


def label(row: Row) -> str:
    """What a row's model is called."""
    name = row.criterion if row.criterion == "dense" else f"{row.criterion}@{row.samples}, {row.protocol}"
    recovery = row.figures.get("recovery") or NONE
    return name + (f" + {recovery}" if recovery != NONE else "")


def render(rows: Sequence[Row], published: Sequence[Published], names: Sequence[str]) -> str:
    """Markdown: the rows measured, then the published ones, both from little removed to much.

    Args:
        names: of the two texts; none where quality was not measured.
    """
    first, second = (*names, "text", "second text")[:2]
    head = [text.format(first, second) for text in HEAD]
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line(_measured(row)) for row in sorted(rows, key=lambda r: r.removed)]
    lines += [_line(_published(row)) for row in sorted(published, key=lambda r: (r.removed, r.block))]
    notes = [
        "",
        "Published perplexities are of WikiText-2 and Penn Treebank, and of the model that their rows name, whatever "
        "was measured above them. 'from' says where they were read; benchmarks/published.csv has sources and notes.",
    ]
    return "\n".join(lines + notes)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "" if value is None else form.format(value)


def _measured(row: Row) -> list[str]:
    name = "dense" if row.criterion == "dense" else f"{row.criterion}@{row.samples}, {row.protocol}"
    mean = _number(row.mean) + ("" if row.mean_se is None else f" ± {row.mean_se:.2f}")
    perplexities = [row.text_128, row.text_2048, row.second_text_128, row.second_text_2048]
    cells = [f"{row.removed:.1%}", name, row.recovery or "", *map(_number, perplexities), mean]
    return [*cells, _number(row.macs / 1e9), _number(row.prefill_ms), _number(row.decode_ms), "measured"]


def _published(row: Published) -> list[str]:
    at = {block: (row.wikitext2, row.ptb) if row.block == block else (None, None) for block in (128, 2048)}
    perplexities = [at[block][which] for which in (0, 1) for block in (128, 2048)]
    mean = _number(row.tasks_mean) + (f" ({row.tasks} tasks)" if row.tasks not in (None, 7) else "")
    cells = [f"{row.removed:.0%}", f"{row.method}, {row.model}", row.recovery, *map(_number, perplexities), mean]
    return [*cells, _number(None if row.macs is None else row.macs / 1e9), "", "", row.read_from]
