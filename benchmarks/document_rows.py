"""What the tables of the documents are made with: rows of the CSV files, Markdown, and the line of their sources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import rows
from .environment import REPOSITORY

Line = dict[str, str]


def read(name: str, device: str = "") -> list[Line]:
    """Rows of a CSV file, oldest first, of devices whose name contains a text."""
    found = rows.read(REPOSITORY / "benchmarks" / f"{name}.csv")
    return sorted((row for row in found if device in row["device"]), key=lambda row: row["date"])


def latest(lines: Iterable[Line], *keys: str) -> dict[tuple[str, ...], Line]:
    """The last row of each combination of values, in the order in which the combinations first came."""
    return {tuple(row[key] for key in keys): row for row in lines}


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def sources(lines: Iterable[Line]) -> str:
    """Where figures come from: devices, versions, and the day and commit of each run."""
    told = []
    for row in lines:
        where = f"CUDA {row['cuda']}" if row["cuda"] else f"{row['threads']} threads" if row["threads"] else ""
        triton = f"triton {row['triton']}" if row["triton"] else ""
        versions = ", ".join(filter(None, (f"torch {row['torch']}", triton, where)))
        told.append((f"{row['device']} ({versions})", f"{row['date'][:10]} at {row['commit']}"))
    parts = []
    for device in dict.fromkeys(device for device, _ in told):
        runs = dict.fromkeys(run for where, run in told if where == device)
        parts.append(f"{device}: {', '.join(runs)}")
    return f"\n\n*{'; '.join(parts)}.*"


def percent(value: str) -> str:
    return f"{100 * float(value):.0f} %"


def figure(value: str | float) -> str:
    """Three digits that count."""
    return f"{float(value):#.3g}".rstrip(".")
