"""What the content of a `hywia.json` says, for the model card, the HTML page and the console.

The readers take any JSON object: what is missing or of another type than `hywia prune` writes is left out, so that a
record of an older or newer version still makes a page.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import HywiaError
from ..types import Plan, Scores, channels_of_gone_experts

__all__ = [
    "KindWidths",
    "Reduction",
    "base_of",
    "command_line",
    "evaluation_text",
    "kind_widths",
    "mapping",
    "plain",
    "prompt_of",
    "reading",
    "recovery_text",
    "reduction",
    "score_summary",
    "settings",
    "spans",
    "summary_rows",
    "versions_of",
]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

# Where a fact stands in the record, and what a reader calls it. The first are the request, which a recorded recipe
# states more exactly; the others are what the run made of it.
_REQUEST = (
    ("plan.ratio", "share of all parameters asked for"),
    ("plan.group_ratio", "share of each group's units asked for"),
    ("plan.layers", "layers that may be cut (first, end)"),
    ("plan.units", "kinds of units that may go"),
    ("plan.layout", "layout"),
    ("plan.align", "channel widths are multiples of"),
    ("plan.scores.criterion", "criterion"),
    ("plan.scores.fusion", "fusion of fine and coarse importance"),
    ("plan.scores.order", "Taylor order"),
    ("plan.scores.heads", "heads are ranked by"),
    ("plan.layers_by", "layers are ranked by"),
    ("plan.scores.statistics.calib", "calibration text"),
    ("plan.scores.statistics.samples", "calibration samples"),
    ("plan.scores.statistics.seq_len", "tokens a sample"),
    ("plan.scores.statistics.seed", "seed"),
    ("plan.refit.ridge", "ridge of the reconstruction"),
    ("plan.refit.passes", "passes in which layers were trained"),
)
_OUTCOME = (
    ("plan.target", "planned for the device"),
    ("plan.constraints", "serving rules"),
    ("plan.binding", "serving rules that bind"),
    ("plan.search.tried", "plans that were tried"),
    ("plan.search.divergence", "divergence of the best of them, nats a token"),
    ("plan.depth.gone", "layers that went"),
    ("plan.scores.statistics.calibration_sha256", "SHA-256 of the calibration tokens"),
    ("plan.scores.statistics.dtype", "calibrated in"),
    ("plan.scores.statistics.device", "calibrated on"),
    ("plan.scores.statistics.backend", "kernels"),
    ("plan.refit.samples", "samples of the reconstruction"),
    ("plan.refit.tokens", "tokens of the reconstruction"),
    ("plan.fingerprint", "fingerprint of the weights that were cut"),
)


@dataclass(frozen=True)
class KindWidths:
    """Units of one kind by layer.

    Attributes:
        kind: "mlp", "attention" or "experts"; "layers" of whole layers, whose one entry is their number.
        before: units in each layer before the cut; None where the record does not say.
        after: units kept in each layer; 0 in those that went.
    """

    kind: str
    before: list[int] | None
    after: list[int]


@dataclass(frozen=True)
class Reduction:
    """How many parameters a cut, or several in a row, took away.

    Attributes:
        before, after: number of parameters of the whole model.
    """

    before: int
    after: int

    @property
    def removed(self) -> int:
        return self.before - self.after

    @property
    def share(self) -> float:
        """The share of the parameters before that went, in [0, 1)."""
        return 1.0 - self.after / self.before


def score_summary(scores: Scores, plan: Plan) -> list[dict[str, Any]]:
    """What a record keeps of the scores: one mapping per group of a layer and an expert that stay, where units may go.

    Its keys are "group", "kind", "layer", "units" and "kept"; "quantiles", which are the least score, the lower
    quartile, the median, the upper quartile and the largest score; "least_kept" and "largest_removed", which are scores
    (the latter None where nothing goes); and "loss_removed", the estimated loss of the units that go as a share of the
    group's (None where the criterion estimates none).
    """
    rows: list[dict[str, Any]] = []
    if plan.record.get("units") == ["layers"]:
        return rows
    gone = channels_of_gone_experts(plan.staying, plan.keep)
    for group in plan.staying:
        if group.name in gone:
            continue
        values = scores.values[group.name].double()
        kept = torch.zeros(group.units, dtype=torch.bool)
        kept[plan.keep[group.name]] = True
        loss = scores.loss.get(group.name)
        quantiles = torch.quantile(values, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)).tolist()
        rows.append(
            {
                "group": group.name,
                "kind": group.kind,
                "layer": group.layer,
                "units": group.units,
                "kept": int(kept.sum()),
                "quantiles": quantiles,
                "least_kept": float(values[kept].min()),
                "largest_removed": float(values[~kept].max()) if not kept.all() else None,
                "loss_removed": float(loss.double()[~kept].sum() / loss.double().sum().clamp_min(1e-300))
                if loss is not None
                else None,
            }
        )
    return rows


@contextmanager
def reading() -> Iterator[None]:
    """Turn the errors that a damaged record causes in its reader into one that names the record.

    Raises:
        HywiaError: the block failed on a value that the record should not hold.
    """
    try:
        yield
    except HywiaError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise HywiaError(
            f"hywia.json is damaged ({type(error).__name__}: {error}): expected what 'hywia prune' and 'hywia bench "
            "--record' write; take back what was changed by hand, or write the directory again"
        ) from error


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def plain(value: Any) -> str:
    """Text without control characters, marks of writing direction and lone surrogates; lines and tabs stay."""
    return _CONTROL.sub("\ufffd", str(value).replace("\r\n", "\n").replace("\r", "\n"))


def spans(widths: Sequence[int]) -> str:
    """Widths by layer as text: `1,536` when all are equal, `1,536 x4, 768 x25, 1,536` otherwise. Layers that went,
    whose width is 0, are left out."""
    runs: list[list[int]] = []
    for width in (w for w in widths if w):
        if runs and runs[-1][0] == width:
            runs[-1][1] += 1
        else:
            runs.append([width, 1])
    return f"{runs[0][0]:,}" if len(runs) == 1 else ", ".join(f"{w:,} x{n}" if n > 1 else f"{w:,}" for w, n in runs)


def _counts(value: Any) -> list[int] | None:
    """The value where it is a list of whole numbers, one per layer; else None."""
    whole = isinstance(value, list) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    return value if whole else None


def kind_widths(record: Mapping[str, Any]) -> list[KindWidths]:
    """Units by layer before and after the cut, one row per kind of unit."""
    plan = mapping(record.get("plan"))
    before = {kind: _counts(widths) for kind, widths in mapping(plan.get("widths_before")).items()}
    if not before:
        by_kind: dict[str, dict[int, int]] = {}
        for row in summary_rows(record):
            by_kind.setdefault(row["kind"], {})[row["layer"]] = row["units"]
        before = {kind: [layers[i] for i in sorted(layers)] for kind, layers in by_kind.items()}
    rows = []
    for kind, widths in mapping(plan.get("widths")).items():
        after, old = _counts(widths), before.get(kind)
        if after is not None:
            rows.append(KindWidths(str(kind), old if old is not None and len(old) == len(after) else None, after))
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def summary_rows(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The complete rows of a record's `score_summary`, by layer."""

    def is_whole(row: Any) -> bool:
        if not isinstance(row, Mapping) or not isinstance(row.get("kind"), str):
            return False
        quantiles = row.get("quantiles")
        return (
            all(isinstance(row.get(key), int) for key in ("layer", "units", "kept"))
            and isinstance(quantiles, list)
            and len(quantiles) == 5
            and all(_is_number(q) for q in quantiles)
            and _is_number(row.get("least_kept"))
        )

    rows = record.get("scores_summary")
    return sorted(filter(is_whole, rows), key=lambda row: row["layer"]) if isinstance(rows, list) else []


def reduction(record: Mapping[str, Any]) -> tuple[Reduction | None, Reduction | None]:
    """What this cut removed, and what all cuts since the original did (None where there was no earlier one); both None
    where the record does not say."""
    plan = mapping(record.get("plan"))
    before, after = plan.get("parameters_before"), plan.get("parameters_after")
    if not (isinstance(before, int) and isinstance(after, int) and before >= after > 0):
        return None, None
    steps = record.get("history")
    first = mapping(steps[0]).get("parameters_before") if isinstance(steps, list) and steps else None
    total = Reduction(first, after) if isinstance(first, int) and first >= before else None
    return Reduction(before, after), total


def base_of(record: Mapping[str, Any]) -> str | None:
    """The model that was cut, as it was named: a hub id, a directory, a file."""
    for value in (mapping(record.get("arguments")).get("model"), record.get("base")):
        if isinstance(value, str) and value:
            return value
    return None


def command_line(record: Mapping[str, Any]) -> str | None:
    """The command that made the model; None where it was made from Python, or the record is of an older version."""
    words = mapping(record.get("arguments")).get("argv")
    if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
        return None
    return shlex.join(["hywia", *words])


def versions_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Package name -> version that the model was made with; empty where the record does not say."""
    return {str(name): str(version) for name, version in mapping(record.get("versions")).items()}


def evaluation_text(record: Mapping[str, Any]) -> str | None:
    """A clause on the text that the perplexity was measured on; None where the record does not say."""
    text = mapping(mapping(record.get("evaluation")).get("text"))
    if not isinstance(text.get("name"), str):
        return None
    parts = [Path(text["name"]).name]  # where the file lay on the machine of the run is nobody's business
    if isinstance(text.get("sha256"), str):
        parts.append(f"SHA-256 {text['sha256']}")
    if isinstance(text.get("block"), int) and isinstance(text.get("blocks"), int):
        parts.append(f"{text['blocks']:,} blocks of {text['block']:,} tokens")
    return ", ".join(parts)


def prompt_of(record: Mapping[str, Any]) -> str | None:
    """The text that both models were asked to continue, in one line; None where the record does not say."""
    prompt = mapping(record.get("arguments")).get("prompt")
    return " ".join(prompt.split()) if isinstance(prompt, str) else None


def recovery_text(record: Mapping[str, Any]) -> str | None:
    """A clause on how the model was trained after the cut; None where it was not, or is as it was before."""
    done = mapping(record.get("recovery"))
    checks = done.get("divergences")
    if not done.get("kept") or not isinstance(checks, list) or not checks:
        return None
    values = [pair[1] for pair in checks if isinstance(pair, list) and len(pair) == 2 and _is_number(pair[1])]
    if len(values) != len(checks):
        return None
    sources = mapping(done.get("text_read")).get("sources")
    names = [mapping(s).get("source") for s in sources] if isinstance(sources, list) else []
    written = "text that the dense model wrote" if names == ["self"] else "text"
    return (
        f"trained ({done.get('tune')}) in {done.get('steps')} steps on {written} to predict what the dense model "
        f"predicts; its divergence from it on held-out text went from {values[0]:.3f} to {min(values):.3f} nats a token"
    )


def _shown(value: Any) -> str | None:
    """A setting's value as people write it; None for what is no setting: nothing, or a long list."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return f"{value:,}" if value > 9999 else str(value)
    if isinstance(value, str):
        return value or None
    if isinstance(value, Mapping):
        parts = [(k, _shown(v)) for k, v in value.items()]
        return ", ".join(f"{k} {v}" for k, v in parts if v is not None) or None
    if isinstance(value, (list, tuple)) and 0 < len(value) <= 16:
        items = [_shown(v) for v in value]
        return ", ".join(item for item in items if item is not None) or None
    return None


def _facts(record: Mapping[str, Any], table: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Name and value of those facts of a table that the record holds."""
    for path, name in table:
        value: Any = record
        for key in path.split("."):
            value = mapping(value).get(key)
        shown = _shown(value)
        if shown is not None:
            yield name, shown


def settings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of everything that decided the outcome.

    First comes the recorded recipe, or where there is none the request as the plan states it; then what the run made of
    it.
    """
    recipe = mapping(record.get("recipe"))
    if recipe:
        rows = [(str(k).replace("_", " "), shown) for k, v in recipe.items() if (shown := _shown(v)) is not None]
    else:
        rows = list(_facts(record, _REQUEST))
    return rows + list(_facts(record, _OUTCOME))
