"""The table of what `bench_large` measured, from `large.csv`."""

from __future__ import annotations

from .document_rows import Line, figure, latest, markdown, read, sources

_WORK = {
    "lean": "scoring, lean",
    "score": "scoring, a layer at a time",
    "copy": "copying the files",
    "cut": "cutting the files",
    "refit": "cutting and reconstructing the files",
}
_LIMITS = {
    "compute": "the compute",
    "transfer": "the transfers",
    "lean": "lean",
    "copy": "the copy",
}


def _place(row: Line) -> str:
    if row["place"] == "disk":
        return f"disk to disk, {'1 GPU' if row['peak_bytes'] else 'no GPU'}"
    gpus = f"{row['ranks']} GPUs" if int(row["ranks"] or 1) > 1 else "1 GPU"
    return f"{gpus}, weights on the {row['place']}" if row["place"] in ("device", "host") else f"{gpus}, files"


def _against(row: Line) -> str:
    if row["limit"] == "one rank":
        ranks = int(row["ranks"])
        return "" if ranks == 1 else f"{figure(ranks / float(row['ratio']))} times one GPU's rate"
    return f"{figure(row['ratio'])} of {_LIMITS[row['limit']]}" if row["limit"] else ""


def measured() -> str:
    """Seconds, samples a second, memory, and the ratio to what each is held against."""
    found = read("large")
    by = latest(found, "work", "place", "shape", "layers", "ranks", "scaling", "samples", "orders", "limit")
    lines = []
    for row in by.values():
        model = f"{row['shape'].upper()}'s shapes, {row['layers']} layers"
        samples = f"{row['samples']} × {row['length']}" if row["samples"] else ""
        scaled = f", {row['scaling']}" if row["scaling"] else ""
        held = [f"{float(row[name]) / 1e9:.1f}" if row[name] else "" for name in ("peak_bytes", "host_bytes")]
        rate = figure(row["samples_s"]) if row["samples_s"] else ""
        told = [_WORK[row["work"]] + scaled, model, _place(row), samples, row["orders"]]
        lines.append([*told, figure(row["seconds"]), rate, _against(row), *held])
    headings = ["", "model", "where", "samples", "orders", "seconds", "samples a second", "held against"]
    return markdown([*headings, "GB on a GPU", "GB of the host beside"], lines) + sources(by.values())
