"""Texts as they lie on the disk: what real files hold is read, and what cannot be read is named by its line."""

from __future__ import annotations

import gzip
import json
import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.method.reading import bundled_text, documents, json_lines

FUZZ = settings(
    max_examples=int(os.environ.get("HYWIA_FUZZ", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\\u001c", "\\f", "\\r", "\\u0000", "\\n"])
def test_lines_end_at_newlines_alone(tmp_path, inside):
    line = '{"text": "one' + inside + 'two"}'
    got = documents(put(tmp_path, "a.jsonl", f"{line}\n{line}\n"))
    assert got == [json.loads(line)["text"]] * 2
    assert len(got[0]) == 7


ROWS = '{"text": "é one"}\r\n\r\n \t\n{"text": "two"}'


@pytest.mark.parametrize(
    "content",
    [
        ROWS.encode(),
        b"\xef\xbb\xbf" + ROWS.encode(),
        b"\xff\xfe" + ROWS.encode("utf-16-le"),
        b"\xfe\xff" + ROWS.encode("utf-16-be"),
        b"\xff\xfe\x00\x00" + ROWS.encode("utf-32-le"),
        b"\x00\x00\xfe\xff" + ROWS.encode("utf-32-be"),
        ROWS.replace('{"text": "two"}', '\ufeff{"n": ' + "9" * 5000 + ', "text": "two"}').encode(),
    ],
    ids=["plain", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "mark-and-long-number-inside"],
)
def test_encodings_blank_lines_and_line_ends(tmp_path, content):
    assert documents(put(tmp_path, "a.jsonl", content)) == ["é one", "two"]
    assert documents(put(tmp_path, "A.JSONL", content)) == ["é one", "two"]
    assert documents(put(tmp_path, "a.jsonl.gz", gzip.compress(content, mtime=0))) == ["é one", "two"]
    assert documents(put(tmp_path, "nosuffix", content)) == ["é one", "two"], "its first line is an object"
    assert [number for number, _ in json_lines(tmp_path / "a.jsonl")] == [1, 4]


@pytest.mark.parametrize(
    "content",
    [b"one\r\ntwo\rthree\n", b"\xef\xbb\xbfone\ntwo\nthree\n", b"\xff\xfe" + "one\ntwo\r\nthree\n".encode("utf-16-le")],
)
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "wiki.test.raw", "README"])
def test_plain_text(tmp_path, name, content):
    assert documents(put(tmp_path, name, content)) == ["one\ntwo\nthree\n"]


@pytest.mark.parametrize(
    "content",
    [
        '["a", "b"]',
        '[{"text": "a"}, {"text": "b", "id": 3}]',
        '{"text": ["a", "b"]}',
        '{"text": "a"}\n{"text": "b"}\n',
        '\ufeff[\n  {"text": "a"},\n  {"text": "b"}\n]\n',
    ],
)
def test_json_files(tmp_path, content):
    assert documents(put(tmp_path, "a.json", content)) == ["a", "b"]


def test_a_directory_of_texts_is_a_document_each(tmp_path):
    for name in ("b.txt", "a.txt", ".hidden"):
        put(tmp_path, name, name)
    assert documents(str(tmp_path)) == ["a.txt", "b.txt"]


def test_another_field(tmp_path, tokenizer):
    source = put(tmp_path, "a.jsonl", '{"content": "%s", "id": 1}\n' % ("x" * 20))
    with pytest.raises(HywiaError, match=r"line 1: .* got the fields 'content', 'id'; name the one .* --text-field"):
        documents(source)
    assert documents(source, field="content") == ["x" * 20]
    assert hk.calibration(None, tokenizer, source, samples=1, seq_len=20, field="content").shape == (1, 20)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"},\n', "line 2: expected a JSON object, got .*, which is not JSON"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"} trailing\n', "line 3: expected"),
        ("a.jsonl", '{"text": "a"}{"text": "b"}\n', "line 1: expected"),
        ("a.jsonl", '{"text": "a"}\r{"text": "b"}\r', "line 1: expected"),
        ("a.jsonl", '{"text": "a"}\n\0\0\0\n', "line 2: expected"),
        ("a.jsonl", '{"text": "a\0b"}\n', "line 1: expected"),
        ("a.jsonl", '{"text": "unfinished', "line 1: expected"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "line 2: expected a JSON object with a 'text' field, got list"),
        ("a.jsonl", '"a"\n', "line 1: expected a JSON object with a 'text' field, got str"),
        ("a.jsonl", "null\n", "line 1: expected a JSON object with a 'text' field, got null"),
        ("a.jsonl", '{"text": null}\n', "line 1: expected 'text' to be a string, got null"),
        ("a.jsonl", '{"text": 1.5}\n', "line 1: expected 'text' to be a string, got float"),
        ("a.jsonl", '{"text": %s}\n' % ("9" * 5000), "line 1: expected 'text' to be a string"),
        ("a.jsonl", '{"text": ["a"]}\n', "line 1: expected 'text' to be a string, got list"),
        ("a.jsonl", '{"text": "ok"}\n{"text": "a\\ud800b"}\n', r"line 2: .* surrogate pair \(\\ud800\) at character 2"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: .* nested too deeply"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "UTF-8 text .*: line 2: "),
        ("a.jsonl", b"\xff\xfe" + '{"text": "a"}\n'.encode("utf-16-le") + b"\x00\xd8", "UTF-8 text .*: line [12]: "),
        ("a.jsonl", "\n \r\n", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.json", " ", "is empty"),
        ("a.json", '[\n"a",\n]', "line [23]: expected JSON"),
        ("a.json", '["a", 5]', "entry 2: expected a JSON object with a 'text' field, got int"),
        ("a.json", '{"data": ["a"]}', "entry 1: .* got the fields 'data'"),
        ("a.json", '{"text": "a"}\n{"text": 5}', "line 2: expected 'text' to be a string, got int"),
        ("a.txt", b"one\ntwo \xff", "UTF-8 text .*: line 2: invalid start byte"),
        ("a.txt", "one\ntwo\n".encode("utf-16-le"), "line 1: it holds NUL characters"),
        ("a.txt", b"ab\ncd\0", "line 2: it holds NUL characters"),
        ("a.txt", b"\xef\xbb\xbf", "is empty"),
        ("a.txt.gz", b"no gzip", "cannot read"),
        ("a.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:30], "cannot read"),
        ("a.arrow", b"ARROW1", r"expected a .txt, .jsonl, .json, .csv, .tsv or .parquet file"),
        ("a.csv.zst", "a,b", r"expected a .txt, .jsonl, .json, .csv, .tsv or .parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    with pytest.raises(HywiaError, match=message) as error:
        documents(put(tmp_path, name, content))
    assert str(tmp_path / name) in str(error.value)


def test_names_without_a_file(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.json", "a.txt.gz"):
        with pytest.raises(HywiaError, match="calib: no such file"):
            documents(str(tmp_path / name))
    with pytest.raises(UsageError, match="got an empty name"):
        documents("")


def test_a_tokenizer_that_fails_is_told_from_the_text(tmp_path):
    class Failing:
        bos_token_id = eos_token_id = None

        def __call__(self, text, **keywords):
            if "bad" in text:
                raise TypeError("TextInputSequence must be str")
            return {"input_ids": [1] * len(text)}

    source = put(tmp_path, "a.jsonl", '{"text": "fine, long enough"}\n{"text": "this is bad"}\n')
    with pytest.raises(HywiaError, match=r"calib: document 2 of the source: the tokenizer fails on it \(TextInput"):
        hk.calibration(None, Failing(), source, samples=9, seq_len=8)


def test_the_bundled_text_is_this_one():
    """The figures of records are comparable only while it does not change."""
    import hashlib

    text = bundled_text()
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "030cdaf378068394f0accc49a8ec7e2d02954bc74124a8697cfe3ccdc9ac4f7c"
    )
    assert text.isascii()
    assert text.startswith("CHAPTER I\n")


@FUZZ
@given(
    content=st.binary(max_size=200)
    | st.lists(st.sampled_from([b'{"text": "a"}', b"\n", b"\r", b"\xff", b"\0"])).map(b"".join)
)
@example(content=b"\xff\xfe\x00\x00\x00")
@example(content=b"\xff\xfe\n\x00\n")
@example(content=b'{"text": "\xed\xa0\x80"}')
@example(content=b"\xef\xbb\xbf\xef\xbb\xbf")
def test_any_bytes_are_documents_or_an_error(tmp_path, content):
    for name in ("f.jsonl", "f.json", "f.txt", "f", "f.jsonl.gz"):
        try:
            got = documents(put(tmp_path, name, content))
        except HywiaError as error:
            assert str(tmp_path / name) in str(error)  # noqa: PT017
            if name == "f.jsonl":
                assert "line " in str(error) or "is empty" in str(error)  # noqa: PT017
        else:
            assert got
            assert all(isinstance(text, str) for text in got)
            "".join(got).encode("utf-8")


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(codec=None, exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "id", "\ud800"]), inner),
    max_leaves=6,
)


@FUZZ
@given(rows=st.lists(VALUES | st.fixed_dictionaries({"text": st.text()}), min_size=1, max_size=5), ascii=st.booleans())
@example(rows=[{"text": "\u2028"}, {"text": "\ud83d\ude00"}], ascii=True)
@example(rows=[{"text": "a"}, {"text": "\udc00"}], ascii=True)
def test_any_lines_are_their_texts_or_an_error_at_the_first_that_is_none(tmp_path, rows, ascii):
    lines = [json.dumps(row, ensure_ascii=ascii).encode("utf-8", "replace") for row in rows]
    source = put(tmp_path, "s.jsonl", b"\n".join(lines))
    read = [json.loads(line) for line in lines]

    def is_text(row):
        text = row.get("text") if isinstance(row, dict) else None
        return isinstance(text, str) and not any(0xD800 <= ord(c) < 0xE000 for c in text)

    wrong = next((i for i, row in enumerate(read, 1) if not is_text(row)), None)
    if wrong is None:
        assert documents(source) == [row["text"] for row in read]
    else:
        with pytest.raises(HywiaError, match=rf"line {wrong}: expected"):
            documents(source)
