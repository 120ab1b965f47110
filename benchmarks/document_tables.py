"""The tables of the documents, each from the rows of a CSV file; `documents` puts them where they belong.

Of several runs of one thing the latest row is shown. A table names its devices, versions and commits itself, in the
line below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from . import history_table, op_tables, quality_tables, scale_paper, scale_tables, trial_tables
from .document_rows import figure, latest, markdown, percent, read, sources


def _mean(values: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))


_WIDTHS = {
    "dense": "dense, 32 × 11008",
    "22x9232": "20 %: 22 × 9232",
    "24x8256@4:30": "LLM-Pruner 20 %: 24 × 8256 in layers 4 to 29",
    "16x5120": "50 %: 16 × 5120",
    "13x4403@3:31": "LLM-Pruner 50 %: 13 × 4403 in layers 3 to 30",
}
_PHASES = {
    ("prefill", "1", "2048"): "prefill 1 × 2048",
    ("prefill", "8", "512"): "prefill 8 × 512",
    ("decode", "1", "512"): "decode 1",
    ("decode", "16", "512"): "decode 16",
}


def speed() -> str:
    """Pruned LLaMA-7B shapes: ms, times dense, share of the ideal."""
    found = [row for row in read("speed", "H100") if row["mode"] == "static" and row["shape"] == "7b"]
    by = latest(found, "model", "phase", "batch", "context")
    lines = []
    for model, shown in _WIDTHS.items():
        cells = []
        for phase in _PHASES:
            row = by[(model, *phase)]
            more = "" if model == "dense" else f", {float(row['speedup']):.2f}, {percent(row['share'])}"
            cells.append(figure(row["ms"]) + more)
        lines.append([shown, f"{float(by[(model, *phase)]['parameters']) / 1e9:.2f} B", *cells])
    return markdown(["heads × channels", "parameters", *_PHASES.values()], lines) + sources(by.values())


_CRITERIA = {
    ("torch_pruning", "MagnitudeImportance"): "Torch-Pruning, Magnitude",
    ("torch_pruning", "TaylorImportance"): "Torch-Pruning, Taylor",
    ("torch_pruning", "TaylorImportance multivariable"): "Torch-Pruning, Taylor, multivariable",
    ("torch_pruning", "HessianImportance"): "Torch-Pruning, Hessian",
    ("llm_pruner", "MagnitudeImportance"): "LLM-Pruner, Magnitude",
    **{("llm_pruner", name): f"LLM-Pruner, {name}" for name in ("vectorize", "param_first", "param_second")},
    ("llm_pruner", "param_mix"): "LLM-Pruner, param_mix",
}


def scorers() -> str:
    """Drop-in scorers: theirs and ours, on LLaMA-7B's shapes and on SmolLM2."""
    gpu = latest(read("integrations", "H100"), "tool", "criterion", "side")
    cpu = latest((row for row in read("integrations") if not row["cuda"]), "tool", "criterion", "side")
    lines = []
    for key, shown in _CRITERIA.items():
        theirs, ours = gpu[(*key, "theirs")], gpu[(*key, "ours")]
        lines.append(
            [
                shown,
                *(figure(row["seconds"]) for row in (theirs, ours)),
                f"{float(ours['times_faster']):.1f}",
                *(f"{float(row['peak_over_weights']):.2f}" for row in (theirs, ours)),
                f"{float(cpu[(*key, 'ours')]['times_faster']):.1f}",
            ]
        )
    headings = ["", "theirs s", "ours s", "times", "peak, × weights: theirs", "ours", "times on two cores"]
    return markdown(headings, lines) + sources([*gpu.values(), *cpu.values()])


def taylor() -> str:
    """taylor_importance in bf16: share of copy bandwidth, and times torch.compile."""
    found = [row for row in read("results", "H100") if row["op"] == "taylor_importance"]
    by = latest(found, "case", "implementation")
    shapes = ("4096x4096", "11008x4096", "4096x11008", "28672x8192", "8192x28672")
    columns = {f"{axis} {order}": f"{long} {order}" for axis, long in (("rows", "rows"), ("cols", "columns"))
               for order in ("first", "mixed")}  # fmt: skip
    lines, used = [], []
    for shape in shapes:
        cells = []
        for column in columns:
            case = f"{shape} bf16 {column}"
            ours = min(
                (by[case, name] for name in ("cuda", "triton") if (case, name) in by),
                key=lambda row: float(row["work_us"]),
            )
            compiled = by[case, "torch.compile"]
            times = float(compiled["work_us"]) / float(ours["work_us"])
            cells.append(f"{percent(ours['share_of_copy'])} / {times:.2f}")
            used.append(ours)
        lines.append([shape.replace("x", "×"), *cells])
    return markdown(["shape", *columns.values()], lines) + sources(used)


_FLOWS = {
    "plain": "forward + backward",
    "param_mix": "LLM-Pruner param_mix",
    "fast": "`calibrate`, fast",
    "lean": "`calibrate`, lean",
    "auto": "`calibrate`, auto",
}


def scoring() -> str:
    """Whole passes of LLaMA-7B's shapes."""
    found = [row for row in read("engine", "H100") if row["shape"] == "7b" and row["flow"] in _FLOWS]
    by = latest(found, "flow", "samples")
    ordered = sorted(by.values(), key=lambda row: (int(row["samples"]), list(_FLOWS).index(row["flow"])))
    lines = [
        [
            _FLOWS[row["flow"]] + (f" ({row['memory']})" if row["flow"] == "auto" else ""),
            f"{row['samples']} × {row['length']}",
            f"{float(row['seconds']):.3f}",
            f"{1e3 * float(row['seconds_per_sample']):.1f}",
            f"{float(row['ratio_to_plain']):.2f}",
            f"{float(row['peak_bytes']) / 1e9:.1f}",
            f"{float(row['peak_over_weights']):.2f}",
        ]
        for row in ordered
    ]
    headings = ["flow", "samples", "s", "ms a sample", "× forward + backward of its run", "peak GB", "× weights"]
    return markdown(headings, lines) + sources(ordered)


def distillation() -> str:
    """The distillation loss beside Liger-Kernel's and eager torch, forward and backward."""
    by = latest(read("distillation"), "case", "implementation")
    lines = [
        [
            f"{int(row['tokens']):,} × {int(row['words']):,}",
            f"{row['student_features']} / {row['teacher_features']}",
            row["dtype"],
            row["implementation"] + (f" {row['liger']}" if row["implementation"].startswith("liger") else ""),
            figure(row["ms"]),
            f"{float(row['ratio_to_hywia']):.2f}",
            f"{float(row['peak_bytes']) / 1e9:.2f}",
            f"{float(row['hidden_error']):.0e}",
        ]
        for row in by.values()
    ]
    headings = ["tokens × words", "features", "dtype", "by", "ms", "× ours", "peak GB", "error"]
    return markdown(headings, lines) + sources(by.values())


_OTHERS = {
    "lp:param_second": "LLM-Pruner param_second: its best",
    "lp:param_mix": "LLM-Pruner param_mix",
    "lp:vectorize": "LLM-Pruner vectorize",
    "coarse": "coarse, second order",
    "attention": "attention",
    "wanda-sp": "Wanda-sp",
    "flap": "FLAP, biases compensated",
    "fine": "fine, second order",
    "recipe-unrefitted": "the recipe without reconstruction, head ranking and adaptive layout",
    "recipe-uniform": "the recipe, layers uniform",
    "recipe-attention": "the recipe with attention's blend",
    "recipe-coarse": "the recipe with the coarse grain alone",
    "recipe-mean": "the recipe with the mean of both grains",
    "recipe-product": "the recipe with their product",
    "recipe-learned": "the recipe with masks learned from attention's scores",
    "recipe": "the recipe: the fine grain alone",
}
_SHARES = ("A25", "A50", "B25", "B60")


def criteria(settings: Sequence[str] = _SHARES) -> str:
    """SmolLM2's perplexity by criterion, shares of the units of each kind; geometric means over three calibration
    seeds, or so many as a cell says. Criteria without a figure are left out."""
    found = [
        row
        for row in read("quality")
        if (row["text"], row["block"], row["layers"]) == ("wikitext2_raw_test.txt", "128", "4:28")
        and row["recovery"] in ("", "none")
    ]
    by = latest(found, "criterion", "samples", "setting", "seed")
    lines, used = [], []
    for name, shown in _OTHERS.items():
        for samples in dict.fromkeys(key[1] for key in by if key[0] == name):
            cells = []
            for wanted in settings:
                mine = [row for key, row in by.items() if key[:3] == (name, samples, wanted)]
                used += mine
                mean = f"{_mean([float(row['perplexity']) for row in mine]):.1f}" if mine else ""
                cells.append(mean + (f" ({len(mine)})" if mine and len(mine) != 3 else ""))
            if any(cells):
                lines.append([shown, f"{int(samples):,}", *cells])
    return markdown(["", "samples scored", *settings], lines) + sources(used)


_SERVED = {"smollm2": "dense", "smollm2-20": "20 % less", "smollm2-50": "50 % less"}
_FORMATS = {"float32": "transformers, float32", **{name: f"llama.cpp, {name}" for name in ("F16", "Q8_0", "Q4_K_M")}}
_AT_ONCE = ("1", "16", "64")


def served() -> str:
    """SmolLM2 by engine and format: size, agreement, perplexity and speed."""
    by = latest((row for row in read("served") if row["sequences"]), "checkpoint", "format", "sequences")
    told = latest((row for row in read("served") if row["perplexity"]), "checkpoint", "format")
    lines = []
    for checkpoint, shown in _SERVED.items():
        for form, where in _FORMATS.items():
            row = told.get((checkpoint, form))
            if row is None:
                continue
            size = f"{float(row['file_bytes']) / 1e6:.0f}" if row["file_bytes"] else ""
            gap = f", {float(row['gap']):.2g} apart" if row["gap"] else ""
            rates = [by.get((checkpoint, form, number)) for number in _AT_ONCE]
            speeds = ["" if rate is None else figure(rate["tokens_per_second"]) for rate in rates]
            agreed = f"{row['same']} of {row['asked']}{gap}"
            lines.append([f"{shown}: {where}", size, agreed, figure(row["perplexity"]), *speeds])
    heads = [f"{number} at once" for number in _AT_ONCE]
    headings = ["", "MB", "tokens as transformers", "perplexity", f"tokens a CPU second, {heads[0]}", *heads[1:]]
    return markdown(headings, lines) + sources([*told.values(), *by.values()])


def scale() -> str:
    """Models larger than a GPU, on paper, at the rate of the latest lean pass over LLaMA-7B's shapes."""
    wanted = {"shape": "7b", "flow": "lean", "samples": "128"}
    row = [row for row in read("engine", "H100") if wanted.items() <= row.items()][-1]
    rate = scale_paper.rate_of(float(row["seconds"]), int(row["samples"]), int(row["length"]))
    lines = []
    for case in scale_paper.CASES:
        of, hosts = scale_paper.cost(case, rate), f" in {case.hosts} hosts" if case.hosts > 1 else ""
        seconds = [figure(of.compute), figure(of.transfer), figure(of.seconds)]
        sizes = [f"{size / 1e9:,.0f}" for size in (of.weights, of.hidden, of.host)]
        about = [case.model.name, f"{case.gpus}{hosts}", case.weights, f"{case.samples} × {scale_paper.LENGTH}"]
        lines.append([*about, *seconds, *sizes])
    headings = ["model", "GPUs", "weights", "samples", "compute s", "transfers s", "scoring s"]
    headings += ["GPU: GB of weights", "GB of hidden states a process", "host: GB of weights"]
    return markdown(headings, lines) + sources([row])


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "scorers": scorers,
    "taylor": taylor,
    "scoring": scoring,
    "distillation": distillation,
    "criteria": criteria,
    "served": served,
    "captured": lambda: op_tables.captured(_WIDTHS, _PHASES),
    "cut": op_tables.cut,
    "recipe": op_tables.recipe,
    "recipe recovered": op_tables.recovered,
    "compact": op_tables.compact,
    "taylor batch": op_tables.batch,
    "taylor on a CPU": op_tables.taylor_cpu,
    "scoring on a CPU": op_tables.scoring_cpu,
    "quality": quality_tables.whole,
    "quality short": quality_tables.short,
    "quality tasks": quality_tables.by_task,
    "history": history_table.history,
    "linear": trial_tables.linear,
    **{f"trials {study}": partial(trial_tables.trials, study) for study in trial_tables.studies()},
    "scale": scale,
    "streamed": scale_tables.measured,
}
