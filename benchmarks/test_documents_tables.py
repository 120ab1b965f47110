"""The tables of README and docs/ are what the CSV files say."""

from __future__ import annotations

import pytest

from . import (
    document_figure,
    document_tables,
    documents,
    history_table,
    op_tables,
    quality_tables,
    rows,
    scale_tables,
    tasks,
    trial_tables,
)


@pytest.mark.parametrize("path", documents.documents(), ids=lambda path: path.name)
def test_tables_are_what_the_files_say(path):
    text = path.read_text(encoding="utf-8")
    assert documents.written(text) == text, "run: make docs"


def test_every_table_is_in_a_document():
    shown = [name for path in documents.documents() for name in documents.names_in(path.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(document_tables.TABLES)


def test_a_table_is_written_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(document_tables.TABLES, "two", lambda: "| 1 | 2 |")
    path = tmp_path / "page.md"
    path.write_text("a\n\n<!-- table two -->\n| 1 | 3 |\n<!-- end of table -->\n\nb\n")
    assert documents.main(["--check", str(path)]) == 1
    assert "not what the CSV files say" in capsys.readouterr().out
    assert "| 1 | 3 |" in path.read_text()
    assert documents.main([str(path)]) == 0
    assert path.read_text() == "a\n\n<!-- table two -->\n| 1 | 2 |\n<!-- end of table -->\n\nb\n"
    assert documents.main(["--check", str(path)]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table none -->\n<!-- end of table -->", "expected one of the tables speed"),
        ("<!-- table speed -->\n", "to be followed by"),
        ("<!-- end of table -->\n", "to be followed by"),
    ],
)
def test_marks_that_are_wrong_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        documents.written(text)


def test_output_of_a_command():
    page = "a\n<!-- output: hywia info -->\n```text\nold\n```\n\n```\nhywia info\n```\n"
    assert documents.with_output(page, "1\n2\n") == page.replace("old", "1\n2")
    with pytest.raises(ValueError, match="expected one '<!-- output"):
        documents.with_output("a\n", "1\n")


def test_figures_come_from_the_latest_row(monkeypatch):
    run = {"torch": "2", "triton": "3", "cuda": "13", "threads": "", "device": "GPU", "commit": "abc"}
    row = {
        "case": "c", "implementation": "hywia", "tokens": "1000", "words": "2000", "student_features": "3",
        "teacher_features": "4", "dtype": "bf16", "liger": "0.8", "ratio_to_hywia": "1", "peak_bytes": "2e9",
        "hidden_error": "0.01",
    }  # fmt: skip
    lines = [
        {**run, **row, "date": "2026-02-02T00:00Z", "ms": "71.04"},
        {**run, **row, "date": "2026-01-01T00:00Z", "ms": "5"},
    ]
    monkeypatch.setattr("benchmarks.rows.read", lambda path: lines)
    assert document_tables.distillation() == (
        "| tokens × words | features | dtype | by | ms | × ours | peak GB | error |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| 1,000 × 2,000 | 3 / 4 | bf16 | hywia | 71.0 | 1.00 | 2.00 | 1e-02 |\n\n"
        "*GPU (torch 2, triton 3, CUDA 13): 2026-02-02 at abc.*"
    )


RUN = {"torch": "2", "triton": "", "cuda": "13", "threads": "", "device": "GPU", "commit": "abc", "command": ""}
WIKI, NOVEL = "wikitext2_raw_test.txt", "a_novel.txt"


def quality_row(criterion, setting, perplexity, seed="0", recovery="none", text=WIKI, **figures):
    known = {
        "model": "smollm2",
        "layers": "all",
        "blocks": "9",
        "block": "128",
        "samples": "10",
        "removed": "0.301",
        "date": "2026-12-02",
    }
    empty = dict.fromkeys(("mean", "mean_se", "seconds", "text_seconds", "recovery_seconds", "divergence"), "")
    row = {
        "criterion": criterion,
        "setting": setting,
        "perplexity": str(perplexity),
        "seed": seed,
        "recovery": recovery,
    }
    return {**RUN, **known, **empty, **row, "text": text, **figures}


@pytest.fixture
def quality(monkeypatch):
    """Rows of a dense model, of LLM-Pruner, of which a seed was measured twice, and of the recipe, cut and recovered;
    beside them rows that are none of theirs."""
    tasks = {"mean": "43.21", "mean_se": "0.52"}
    costs = {"seconds": "4", "recovery_seconds": "30", "text_seconds": "6"}
    lines = [
        quality_row("dense", "P30", 50, layers="4:28", samples="0", **tasks),
        quality_row("dense", "P30", 30, layers="4:28", samples="0", text=NOVEL, **tasks),
        quality_row("lp:param_second", "P30", 999, date="2026-01-01"),
        quality_row("lp:param_second", "P30", 200),
        quality_row("lp:param_second", "P30", 242, seed="1"),
        quality_row("lp:param_second", "P30", 150, samples="96"),
        quality_row("recipe", "P30", 7, samples="96", seed="1", date="2026-11-30"),  # of what it was then
        quality_row("recipe", "P30", 100, samples="96"),
        quality_row("recipe", "P30", 70, recovery="self", samples="96", divergence="0.25", **costs),
        quality_row("recipe", "P30", 40, recovery="self", samples="96", divergence="0.25", text=NOVEL, **costs),
        quality_row("recipe", "P50", 90, recovery="self", samples="96", removed="0.5", **costs, **tasks),
        quality_row("recipe", "P30", 1, samples="96", model="another"),
        quality_row("recipe", "P30", 2, samples="96", blocks="3"),
        quality_row("recipe", "A50", 4, samples="96"),  # of all layers: not the setting's
    ]
    monkeypatch.setattr("benchmarks.rows.read", lambda path: lines if path.name == "quality.csv" else [])


def test_short_table_of_quality(quality):
    assert quality_tables.short() == (
        "|  | recovery | samples scored | P30 (30 % of all) | P50 (50 % of all) | tasks, P50 | seconds, P50 |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| dense |  |  | 50.0 | 50.0 | 43.2 ± 0.5 |  |\n"
        "| LLM-Pruner | none | 10 | 220.0 ± 21.0 |  |  |  |\n"
        "| LLM-Pruner | none | 96 | 150.0 |  |  |  |\n"
        "| **this package** | none | 96 | 100.0 |  |  |  |\n"
        "| **this package** | this package's | 96 | 70.0 | 90.0 | 43.2 ± 0.5 | 40 |\n\n"
        "*GPU (torch 2, CUDA 13): 2026-12-02 at abc.*"
    )


def test_whole_table_of_quality(quality):
    assert quality_tables.whole().splitlines()[:8] == [
        "|  | method | recovery | samples scored | parameters less | WikiText-2 | a novel | divergence | tasks "
        "| s to cut | s to recover | runs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "|  | dense |  |  |  | 50.0 | 30.0 |  | 43.2 ± 0.5 |  |  | 1 |",
        "| P30 | LLM-Pruner | none | 10 | 30.1 % | 220.0 ± 21.0 |  |  |  |  |  | 2 |",
        "| P30 | LLM-Pruner | none | 96 | 30.1 % | 150.0 |  |  |  |  |  | 1 |",
        "| P30 | **this package** | none | 96 | 30.1 % | 100.0 |  |  |  |  |  | 1 |",
        "| P30 | **this package** | this package's | 96 | 30.1 % | 70.0 | 40.0 | 0.250 |  | 4.0 | 36 | 1 |",
        "| P50 | **this package** | this package's | 96 | 50.0 % | 90.0 |  |  | 43.2 ± 0.5 | 4.0 | 36 | 1 |",
    ]


def test_table_of_tasks(monkeypatch):
    right = dict(zip(tasks.NAMES, map(str, (40, 10, 20, 30, 40, 50, 60)), strict=True))
    lines = [
        quality_row("dense", "P50", 50, samples="0", **right, mean="35.7", mean_se="0.5"),
        quality_row("recipe", "P50", 90, samples="96", **(right | {"boolq": "60"}), mean="38.6", mean_se="0.5"),
        quality_row("recipe", "P50", 90, samples="96", seed="1", **right, mean="35.7", mean_se="0.7"),
        quality_row("recipe", "P30", 80, samples="96", **right),
        quality_row("flap", "P50", 300, **dict.fromkeys(tasks.NAMES, "")),
    ]
    monkeypatch.setattr("benchmarks.rows.read", lambda path: lines if path.name == "quality.csv" else [])
    assert quality_tables.by_task() == (
        "|  | recovery | boolq | piqa | hellaswag | winogrande | arc easy | arc challenge | openbookqa | mean "
        "| without boolq |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| dense |  | 40.0 | 10.0 | 20.0 | 30.0 | 40.0 | 50.0 | 60.0 | 35.7 ± 0.5 | 35.0 |\n"
        "| **this package** | none | 50.0 | 10.0 | 20.0 | 30.0 | 40.0 | 50.0 | 60.0 | 37.2 ± 0.6 | 35.0 |\n\n"
        "*GPU (torch 2, CUDA 13): 2026-12-02 at abc.*"
    )


def test_whole_runs_with_a_recovery(monkeypatch):
    known = {**RUN, "date": "2026-02-02", "shape": "7b", "recover_tokens": "1000000", "tune": "lora", "hold": "live"}
    known |= {"limit_bytes": "", "peak_bytes": ""}
    steps = {"cut": "1", "recovery": "130", "recovery text": "30", "all": "166.4"}
    lines = [{**known, "step": step, "seconds": seconds} for step, seconds in steps.items()]
    lines[-1] = {**lines[-1], "peak_bytes": "9.04e10"}
    limited = {**known, "limit_bytes": "24000000000", "hold": "kept"}
    lines.append({**limited, "step": "recovery", "seconds": "5"})  # of a run that did not end
    lines += [{**limited, "step": "all", "seconds": "9", "peak_bytes": "2e10", "recover_tokens": "2000000"}]
    monkeypatch.setattr("benchmarks.rows.read", lambda path: lines if path.name == "recipe.csv" else [])
    assert op_tables.recovered().splitlines()[2:4] == [
        "| 1,000,000 | lora | live | 30.0 | 130 | 166 | 90.4 |  |",
        "| 2,000,000 | lora | kept |  |  | 9.00 | 20.0 | 24 |",
    ]


def test_files_lie_on_no_device():
    """A cut from files to files needs a GPU for its reconstruction alone."""
    row = {"place": "disk", "ranks": "1"}
    assert scale_tables._place({**row, "peak_bytes": ""}) == "disk to disk, no GPU"
    assert scale_tables._place({**row, "peak_bytes": "5"}) == "disk to disk, 1 GPU"
    assert scale_tables._place({"place": "host", "ranks": "2", "peak_bytes": "5"}) == "2 GPUs, weights on the host"


def test_long_blocks_have_columns_where_there_are_rows(monkeypatch):
    long = {"block": "2048", "blocks": "2"}
    lines = [
        quality_row("dense", "P50", 50, samples="0"),
        quality_row("dense", "P50", 20, samples="0", **long),
        quality_row("dense", "P50", 999, samples="0", block="2048", blocks="1"),  # of less text
        quality_row("recipe", "P50", 90, samples="96", removed="0.5"),
        quality_row("recipe", "P50", 40, samples="96", removed="0.5", **long),
        quality_row("recipe", "P50", 48.4, seed="1", samples="96", removed="0.5", **long),
    ]
    monkeypatch.setattr("benchmarks.rows.read", lambda path: lines if path.name == "quality.csv" else [])
    assert quality_tables.short().splitlines()[:4] == [
        "|  | recovery | samples scored | P50 (50 % of all) | P50, blocks of 2,048 |",
        "| --- | --- | --- | --- | --- |",
        "| dense |  |  | 50.0 | 20.0 |",
        "| **this package** | none | 96 | 90.0 | 44.0 ± 4.2 |",
    ]
    assert quality_tables.whole().splitlines()[:4] == [
        "|  | method | recovery | samples scored | parameters less | WikiText-2 | WikiText-2, 2,048 tokens | runs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "|  | dense |  |  |  | 50.0 | 20.0 | 1 |",
        "| P50 | **this package** | none | 96 | 50.0 % | 90.0 | 44.0 ± 4.2 | 2 |",
    ]
    lines.append(quality_row("flap", "P50", 300, removed="0.5"))
    assert document_figure.perplexities()[0]["this package"] == [(0.0, 50.0), (50.0, 90.0)]


def test_history_has_a_line_for_each_device_and_commit(monkeypatch):
    old, new = {**RUN, "date": "2026-01-01T10:00Z", "commit": "old"}, {**RUN, "date": "2026-01-02T10:00Z"}
    again = {**new, "date": "2026-01-02T11:00Z"}
    scored = {"shape": "7b", "layers": "32", "flow": "fast", "samples": "10", "length": "128"}
    product = {"op": "linear_importance", "case": "11008x4096 bf16 rows 128x128 second", "implementation": "cuda"}
    whole = {"shape": "7b", "layers": "32", "ratio": "0.5", "recover_tokens": "0", "step": "all"}
    files = {
        "engine": [
            {**old, **scored, "ratio_to_plain": "1.5"},
            {**again, **scored, "ratio_to_plain": "1.094"},
            {**new, **scored, "ratio_to_plain": "1.3"},
            {**new, **scored, "flow": "lean", "ratio_to_plain": "9"},
            {**again, **scored, "samples": "128", "ratio_to_plain": "9"},
        ],
        "results": [
            {**old, **product, "share_of_baseline": "0.684"},
            {**old, **product, "implementation": "eager", "share_of_baseline": "0.02"},
        ],
        "recipe": [
            {**new, **whole, "device": "A GPU", "seconds": "25.667"},
            {**new, **whole, "device": "A GPU", "recover_tokens": "100", "seconds": "900"},
        ],
        "quality": [
            quality_row("dense", "P50", 50, samples="0"),
            quality_row("recipe", "P50", 100, samples="96", date="2026-01-02"),
            quality_row("recipe", "P50", 121, samples="96", date="2026-01-02", seed="1"),
            quality_row("recipe", "P50", 70, samples="96", date="2026-01-01", commit="old", recovery="self"),
            quality_row("recipe", "P50", 30, samples="96", date="2026-01-02", block="2048"),
            quality_row("recipe", "P30", 60, samples="96", date="2026-01-02"),
        ],
    }
    monkeypatch.setattr("benchmarks.rows.read", lambda path: files.get(path.stem, []))
    assert history_table.history().splitlines() == [
        "| device | date | commit | scoring, × forward + backward | second order, of cuBLAS: 128 samples "
        "| the recipe, s | P50 perplexity | P50 perplexity, recovered |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| A GPU | 2026-01-02 | abc |  |  | 25.7 |  |  |",
        "| GPU | 2026-01-01 | old | 1.50 | 68 % |  |  | 70.0 |",
        "| GPU | 2026-01-02 | abc | 1.09 |  |  | 110.0 ± 10.5 |  |",
    ]


def test_trials_have_a_line_for_each_variant(monkeypatch):
    head = ("study", "arm", "setting", "value", "to", "unit", "where")
    lines = [
        ("one", "by hand", "4096²", "37.2", "", "µs", "GPU"),
        ("one", "by hand", "of copy", "60", "61", "%", "GPU"),
        ("one", "by rote", "4096²", "33", "", "µs", "GPU"),
        ("two", "by hand", "error", "1e-6", "", "", "GPU"),
        ("two", "by hand", "error", "2e-6", "", "", "CPU"),
        *(("three", f"by {i}", f"of {i}", str(i), "9", "ms", "GPU") for i in range(1, 4)),
    ]
    monkeypatch.setattr(trial_tables, "read_file", lambda path: [dict(zip(head, line, strict=True)) for line in lines])
    assert trial_tables.studies() == ["one", "two", "three"]
    assert trial_tables.trials("one").splitlines() == [
        "| tried | 4096², µs | of copy, % |",
        "| --- | --- | --- |",
        "| by hand | 37.2 | 60 to 61 |",
        "| by rote | 33 |  |",
        "",
        "*Trials: GPU.*",
    ]
    sparse = ["| by 1 | of 1 | 1 to 9 ms |", "| by 2 | of 2 | 2 to 9 ms |", "| by 3 | of 3 | 3 to 9 ms |"]
    assert trial_tables.trials("three").splitlines()[2:5] == sparse
    assert trial_tables.trials("two").splitlines()[2:] == ["| by hand | 1e-6 | GPU |", "| by hand | 2e-6 | CPU |"]


def test_trials_are_figures_and_each_is_there_once():
    lines = rows.read(trial_tables.PATH)
    keys = [tuple(line[name] for name in ("study", "arm", "setting", "unit", "where")) for line in lines]
    assert len(set(keys)) == len(lines) > 100
    assert all(float(line["value"]) != 0 and (not line["to"] or float(line["to"]) > 0) for line in lines)


def test_linear_importance_beside_cublas(monkeypatch):
    run = {**RUN, "device": "NVIDIA H200", "date": "2026-02-02T00:00Z", "op": "linear_importance"}
    lines = [
        {**run, "case": "4096x4096 bf16 rows 10x128 second", "implementation": "cuda", "share_of_baseline": "0.714"},
        {**run, "case": "11008x4096 bf16 rows 10x128 second", "implementation": "cuda", "share_of_baseline": "0.9"},
        {**run, "case": "4096x4096 bf16 rows 10x128 second", "implementation": "eager", "share_of_baseline": "0.02"},
        {**run, "case": "4096x4096 bf16 rows 128x128 all", "implementation": "triton", "share_of_baseline": "0.5"},
        {**run, "case": "4096x4096 bf16 rows 128x128 all", "implementation": "native", "cuda": ""},
    ]
    lines[1] = {**lines[1], "date": "2026-01-01T00:00Z"}
    lines.append({**lines[1], "share_of_baseline": "0.767", "date": "2026-03-03T00:00Z"})
    monkeypatch.setattr("benchmarks.rows.read", lambda path: lines if path.name == "results.csv" else [])
    assert trial_tables.linear().splitlines()[2:] == [
        "| all orders, sums per sample | triton | 128 × 128 | H200 | 50 % |  |  |  |  |  |",
        "| second order | cuda | 10 × 128 | H200 | 71 % | 77 % |  |  |  |  |",
        "",
        "*NVIDIA H200 (torch 2, CUDA 13): 2026-02-02 at abc, 2026-03-03 at abc.*",
    ]


def test_curves_of_the_figure(quality):
    curves, looks = document_figure.perplexities()
    assert curves == {
        "LLM-Pruner": [(0.0, 50.0), (30.1, 150.0)],
        "this package": [(0.0, 50.0), (30.1, 100.0)],
        "this package, recovered": [(0.0, 50.0), (30.1, 70.0), (50.0, 90.0)],
    }
    assert looks["this package"] == (3, 1)
    assert looks["this package, recovered"] == (3, 0)


def test_the_figure_is_what_the_files_say():
    assert document_figure.description_in(document_figure.PATH) == document_figure.described(), "run: make docs"
    assert document_figure.described() in document_figure.svg().replace("&#x27;", "'")


def test_a_figure_that_is_not_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(document_figure, "PATH", tmp_path / "quality.svg")
    assert document_figure.write(check=True)
    assert not (tmp_path / "quality.svg").exists()
    assert document_figure.write()
    assert not document_figure.write()
    assert "prefers-color-scheme:dark" in (tmp_path / "quality.svg").read_text()
