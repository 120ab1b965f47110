"""The tables of README and docs/ are what the CSV files say."""

from __future__ import annotations

import pytest

from . import document_tables, documents


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
