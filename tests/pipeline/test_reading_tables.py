"""Tables as calibration text: the same texts as JSON lines give, and what cannot be read is named by its row."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.method.reading import documents, is_local

pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CSV = 'id,text\n1,"one, é\nline"\n2,NA\n3,None\n4,5\n5,"a ""quoted"" word"\n'
TEXTS = ["one, é\nline", "NA", "None", "5", 'a "quoted" word']


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return str(path)


def table(folder, name="a.parquet", **columns):
    parquet.write_table(pa.table(columns), folder / name)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV.encode()),
        ("A.CSV", CSV.replace("\n", "\r\n").replace("é\r\n", "é\n").encode()),
        ("a[1]*?.csv", CSV.encode()),
        ("a b#c.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.csv", b"\xff\xfe" + CSV.encode("utf-16-le")),
        ("a.csv", b"\xfe\xff" + CSV.encode("utf-16-be")),
        ("a.csv", b"\xff\xfe\x00\x00" + CSV.encode("utf-32-le")),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.tsv", CSV.replace("d,t", "d\tt").replace('1,"', '1\t"').replace("2,", "2\t").replace("3,", "3\t")
         .replace("4,", "4\t").replace("5,", "5\t").encode()),
    ],
)  # fmt: skip
def test_cells_are_texts_as_they_stand(tmp_path, name, content):
    """Also those that table readers take for missing values or numbers."""
    assert documents(put(tmp_path, name, content)) == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path, kind):
    source = table(tmp_path, id=list(range(5)), text=pa.array(TEXTS, kind), blob=[b"\xff"] * 5)
    assert documents(source) == TEXTS


def test_an_empty_cell_is_an_empty_text(tmp_path):
    assert documents(put(tmp_path, "a.csv", "id,text\n1,a\n2,\n3,b\n")) == ["a", "", "b"]


def test_the_same_texts_give_the_same_samples(tmp_path, tokenizer):
    texts = [chr(97 + i) * (30 + i) for i in range(12)]
    sources = [
        put(tmp_path, "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts)),
        put(tmp_path, "a.csv", "text\n" + "\n".join(texts)),
        table(tmp_path, text=texts),
    ]
    first, *others = [hk.calibration(None, tokenizer, s, samples=10, seq_len=16) for s in sources]
    assert first.shape == (10, 16)
    for other in others:
        assert torch.equal(first, other)


def test_a_directory_of_tables_is_their_rows_in_order(tmp_path):
    (tmp_path / "shards").mkdir()
    table(tmp_path / "shards", "1.parquet", text=["c", "d"])
    table(tmp_path / "shards", "0.parquet", text=["a", "b"])
    put(tmp_path / "shards", "2.csv", "text,id\ne,1\n")
    put(tmp_path / "shards", ".lock", "")
    assert documents(str(tmp_path / "shards")) == ["a", "b", "c", "d", "e"]
    put(tmp_path / "shards", "load.py", "raise SystemExit")
    assert not is_local(str(tmp_path / "shards"))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_another_column(tmp_path, name):
    source = put(tmp_path, name, "id,body\n1,x\n") if name == "a.csv" else table(tmp_path, id=[1], body=["x"])
    message = r"expected a column 'text', got the columns 'id', 'body'; name the one .* by --text-field"
    with pytest.raises(HywiaError, match=message):
        documents(source)
    assert documents(source, field="body") == ["x"]
    with pytest.raises(HywiaError, match=r"row 1: expected 'id' to be a string, got int"):
        documents(source, field="id")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "\n\n", "is empty"),
        ("a.csv", "text,id\n", "is empty: it has no rows"),
        ("a.csv", "text\n1\n2.5\n", "row 1: expected 'text' to be a string, got float"),
        ("a.csv", "text,id\na,1\nb,1,2\n", "cannot read .*: .* line 3"),
        ("a.csv", "text,id\na,1,2\nb,1,2\n", "cannot read .*: its rows hold more cells than its header names"),
        ("a.csv", 'text\n"unfinished\n', "cannot read .*: .* EOF inside string"),
        ("a.csv", b"text\na\xff\n", "cannot read .*: 'utf-8' codec"),
        ("a.csv.gz", b"no gzip", "cannot read"),
        ("a.csv.gz", gzip.compress(CSV.encode() * 99, mtime=0)[:60], "cannot read"),
        ("a.tsv", "id\tbody\n1\ta\n", "expected a column 'text', got the columns 'id', 'body'"),
        ("a.parquet", b"", "is empty"),
        ("a.parquet", b"PAR1", "cannot read"),
        ("a.parquet", b"no parquet at all, but long enough", "cannot read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, capfd, name, content, message):
    with pytest.raises(HywiaError, match=message) as error:
        documents(put(tmp_path, name, content))
    assert str(tmp_path / name) in str(error.value)
    assert "Failed to read" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["a", None], "row 2: expected 'text' to be a string, got null"),
        ([1, 2], "row 1: expected 'text' to be a string, got int"),
        ([[["a"]]], "row 1: expected 'text' to be a string, got list"),
        ([b"a"], "row 1: expected 'text' to be a string, got bytes"),
        (pa.array([], pa.string()), "it is empty: it has no rows"),
    ],
)
def test_parquet_cells_that_are_no_texts(tmp_path, cells, message):
    with pytest.raises(HywiaError, match=message):
        documents(table(tmp_path, text=cells))


def test_parquet_that_was_cut_short_or_damaged(tmp_path):
    source = Path(table(tmp_path, text=["hello" * 100] * 3))
    whole = source.read_bytes()
    at = whole.index(b"hello")
    for damaged in (whole[:-9], whole[: len(whole) // 2], whole[:at] + b"\xff\xff" + whole[at + 2 :]):
        with pytest.raises(HywiaError, match=r"cannot read .*a\.parquet: "):
            documents(put(tmp_path, "a.parquet", damaged))


def test_files_that_are_not_there(tmp_path):
    for name in ("a.csv", "a.parquet", "a.tsv.gz"):
        assert is_local(str(tmp_path / name))
        with pytest.raises(HywiaError, match="calib: no such file"):
            documents(str(tmp_path / name))


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(HywiaError, match=r"is a table, which needs: pip install 'hywia_kernels\[hub\]'"):
        documents(put(tmp_path, "a.csv", CSV))
