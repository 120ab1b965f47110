"""Calibration samples."""

from __future__ import annotations

import json

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.method import calibration_data, writing


def write_jsonl(path, texts):
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return str(path)


def test_text_file_gives_distinct_blocks_of_it(tokenizer, tmp_path):
    content = "".join(chr(33 + (i * 7) % 90) for i in range(330))
    (tmp_path / "a.txt").write_text(content)
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    blocks = {tuple(ids[i : i + 32]) for i in range(0, 320, 32)}
    got = hk.calibration(None, tokenizer, str(tmp_path / "a.txt"), samples=10, seq_len=32)
    assert got.shape == (10, 32)
    assert got.dtype == torch.int64
    assert {tuple(row.tolist()) for row in got} == blocks


def test_documents_give_one_window_each(tokenizer, tmp_path):
    texts = [chr(65 + i) * 50 for i in range(20)]
    source = write_jsonl(tmp_path / "d.jsonl", texts)
    got = hk.calibration(None, tokenizer, source, samples=20, seq_len=16)
    assert all(len(set(row.tolist())) == 1 for row in got), "a window never crosses documents that are long enough"
    assert len({row[0].item() for row in got}) == 20


def test_short_documents_are_joined_by_the_end_token(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "d.jsonl", ["abc"] * 40)
    got = hk.calibration(None, tokenizer, source, samples=5, seq_len=16)
    assert got.shape == (5, 16)
    unit = [*tokenizer("abc")["input_ids"], 257]
    assert got.flatten().tolist() == (unit * 40)[:80]


def test_seed_decides(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "d.jsonl", ["".join(chr(33 + (i * j) % 90) for i in range(99)) for j in range(30)])
    one, same, other = (hk.calibration(None, tokenizer, source, samples=4, seq_len=24, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert calibration_data.digest(one) == calibration_data.digest(same) != calibration_data.digest(other)


def test_dataset_through_the_datasets_library(tokenizer, tmp_path):
    """A local folder stands for a hub name: the same call, no network."""
    pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "train.jsonl", [chr(65 + i) * 40 for i in range(26)])
    got = hk.calibration(None, tokenizer, str(tmp_path / "corpus"), samples=6, seq_len=20)
    assert got.shape == (6, 20)
    split = hk.calibration(None, tokenizer, f"{tmp_path / 'corpus'}:default:train", samples=6, seq_len=20)
    assert torch.equal(got, split)
    write_jsonl(tmp_path / "corpus" / "train.jsonl", ["x"])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(HywiaError, match=r"line 1: expected a JSON object with a 'text' field, got the fields 'body'"):
        hk.calibration(None, tokenizer, str(tmp_path / "bare"), samples=1, seq_len=4)
    with pytest.raises(HywiaError, match="could not read dataset"):
        hk.calibration(None, tokenizer, f"{tmp_path / 'corpus'}:default:nosplit", samples=1, seq_len=4)


def test_self_written_text_is_seeded_and_ordinary(gqa, tokenizer):
    one = hk.calibration(gqa, tokenizer, samples=5, seq_len=24, seed=1)
    same = hk.calibration(gqa, tokenizer, samples=5, seq_len=24, seed=1)
    other = hk.calibration(gqa, tokenizer, samples=5, seq_len=24, seed=2)
    assert one.shape == (5, 24)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert int(one.max()) < 256  # ordinary tokens only: its tokenizer puts nothing before a text
    state = torch.random.get_rng_state()
    hk.calibration(gqa, tokenizer, samples=1, seq_len=8)
    assert torch.equal(state, torch.random.get_rng_state())


def test_written_text_begins_as_texts_do_and_one_in_eight_otherwise(gqa, tokenizer, monkeypatch):
    """Behind the same token all of them are written: with it, a sample is the one without, a token later."""
    bare = hk.calibration(gqa, tokenizer, samples=17, seq_len=12, seed=4)
    begins = [i for i in range(17) if i % 8 == 7]
    assert [i for i in range(17) if bare[i, 0] == 256] == begins
    behind = hk.calibration(gqa, tokenizer, samples=17, seq_len=12, seed=4, bos=True)
    assert behind[:, 0].tolist() == [256] * 17
    monkeypatch.setattr(writing, "prefix", lambda tokenizer, bos=None: [] if bos is False else [256])
    adding = hk.calibration(gqa, tokenizer, samples=17, seq_len=12, seed=4)
    assert [i for i in range(17) if adding[i, 0] != 256] == begins
    for i in range(17):
        with_it, without = (bare, adding) if i in begins else (adding, bare)
        assert torch.equal(with_it[i, 1:], without[i, :-1])
    assert int(hk.calibration(gqa, tokenizer, samples=17, seq_len=12, seed=4, bos=False).max()) < 256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "calib: no such file"),
        ("a.txt", "  \n", "is empty"),
        ("a.txt", "short", "shorter than one sample of 16 tokens"),
        ("a.txt", "x" * 40, "holds 2 samples of 16 tokens, 4 were asked for"),
        ("a.jsonl", '{"text": "x"}\n{"txt": 1}\n', "line 2: expected a JSON object with a 'text' field"),
        ("a.jsonl", '{"text": 5}\n', "line 1: expected 'text' to be a string, got int"),
        ("a.jsonl", '{"text": ""}\n', "holds no text"),
        ("a.pdf", "x", "expected a .txt, .jsonl, .json, .csv, .tsv or .parquet file"),
    ],
)
def test_bad_sources(tokenizer, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(HywiaError, match=message):
        hk.calibration(None, tokenizer, str(tmp_path / name), samples=4, seq_len=16)


def test_binary_text_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\xd8" * 10)
    with pytest.raises(HywiaError, match="as UTF-8 text"):
        hk.calibration(None, tokenizer, str(tmp_path / "a.txt"), samples=1, seq_len=4)


@pytest.mark.parametrize(("samples", "seq_len", "message"), [(0, 8, "samples: expected"), (1, 1, "seq_len: expected")])
def test_bad_sizes(tokenizer, samples, seq_len, message):
    with pytest.raises(UsageError, match=message):
        hk.calibration(None, tokenizer, "a.txt", samples=samples, seq_len=seq_len)
