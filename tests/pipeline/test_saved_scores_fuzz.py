"""Saved scores that were damaged: an equal object, or an error that names the directory; never anything else.

HYWIA_FUZZ says how many cases each test tries; 100 where it is not set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint import scores_file
from hywia_kernels.cli import main
from hywia_kernels.types import record
from tests.support.tiny import TINY, fresh

FUZZ = settings(
    max_examples=int(os.environ.get("HYWIA_FUZZ", "100")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
INDEX, TENSORS = "scores.json", "scores.safetensors"
TEXT = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`(folder, scores, statistics)` of a model of one layer."""
    model = fresh(dataclasses.replace(TINY[2], name="one-layer", layers=1, intermediate=8))
    statistics = hk.calibrate(model, TEXT)
    scores = hk.fuse(statistics)
    folder = tmp_path_factory.mktemp("scores") / "s"
    hk.save_scores(folder, scores, statistics)
    return folder, scores, statistics


def same(one, other):
    if one is None or other is None:
        return one is other
    tensors = []
    for each in (one, other):
        parts = [each.values, each.loss] if isinstance(each, hk.Scores) else [each.coarse, *each.fine.values()]
        tensors.append([(name, t.tolist()) for part in parts for name, t in part.items()])
    plain = [(e.groups, e.parameters, e.fingerprint, e.record) for e in (one, other)]
    return plain[0] == plain[1] and sorted(tensors[0]) == sorted(tensors[1])


class Copy:
    """A copy of a directory of scores that can be damaged, with or without digests that say so."""

    def __init__(self, folder):
        self.at = Path(tempfile.mkdtemp(prefix="hywia-fuzz-"))
        for name in (INDEX, TENSORS):
            shutil.copyfile(folder / name, self.at / name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.at)

    @property
    def index(self):
        return json.loads((self.at / INDEX).read_text())

    def write(self, index, signed):
        if signed and isinstance(index, dict):
            index["tensors_sha256"] = scores_file._file_digest(self.at / TENSORS)
            index = record.sealed(index)
        (self.at / INDEX).write_text(json.dumps(index))

    def load(self):
        """What was read, or None where it was refused by name."""
        try:
            return hk.load_scores(self.at)
        except HywiaError as error:
            said = str(error)
        assert said.startswith("scores: "), said
        assert str(self.at) in said, said
        return None


VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 56, 10**30, 0.5, -0.0, float("nan"), float("inf")),
    *("", "mlp", "56", "x" * 300, "\ud800", [], {}, [0], [[]], {"a": 1}, ["mlp"]),
]


def spots(value, path=()):
    """Paths to everything in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from spots(child, (*path, key))


def mutated(value, draw, times):
    """A JSON value, changed in place `times` times or until it has no parts."""
    for _ in range(times):
        value = mutated_once(value, draw) if isinstance(value, (dict, list)) else value
    return value


def mutated_once(index, draw):
    """The value with one thing in it replaced, dropped, doubled or renamed."""
    path = draw.choice(list(spots(index)))
    if not path:
        return draw.choice(VALUES)
    owner = index
    for key in path[:-1]:
        owner = owner[key]
    how = draw.choice(("replace", "replace", "drop", "add", "double", "swap"))
    if how == "replace":
        owner[path[-1]] = draw.choice(VALUES)
    elif how == "drop":
        del owner[path[-1]]
    elif how == "add":
        if isinstance(owner, dict):
            owner["new"] = draw.choice(VALUES)
        else:
            owner.append(draw.choice(VALUES))
    elif how == "double" and isinstance(owner, list):
        owner.insert(0, owner[path[-1]])
    elif isinstance(owner, dict):
        other = draw.choice(list(owner))
        owner[path[-1]], owner[other] = owner[other], owner[path[-1]]
    return index


@FUZZ
@given(seed=st.integers(0, 10**9), times=st.integers(1, 4))
@example(seed=0, times=1)
def test_any_change_of_the_index_is_seen(whole, seed, times):
    draw = random.Random(seed)
    folder, scores, statistics = whole
    with Copy(folder) as copy:
        index = mutated(copy.index, draw, times)
        copy.write(index, signed=False)
        loaded = copy.load()
        if loaded is not None:
            assert same(loaded[0], scores)
            assert same(loaded[1], statistics)


def use(loaded):
    """What is read can be planned and fused, or is refused by name."""
    scores, statistics = loaded
    for call in (
        lambda: hk.plan(scores, ratio=0.1, align=4),
        lambda: hk.plan(scores, group_ratio=0.5, align=4, layout="adaptive"),
        lambda: hk.fuse(statistics) if statistics is not None else None,
    ):
        with contextlib.suppress(HywiaError):
            call()
    for value in (*scores.values.values(), *scores.loss.values()):
        assert bool(torch.isfinite(value).all())


@FUZZ
@given(seed=st.integers(0, 10**9), times=st.integers(1, 3))
@example(seed=9484, times=2)  # units without parameters
@example(seed=0, times=1)
def test_an_index_with_the_right_digest_is_checked_all_the_same(whole, seed, times):
    draw = random.Random(seed)
    with Copy(whole[0]) as copy:
        index = mutated(copy.index, draw, times)
        copy.write(index, signed=True)
        loaded = copy.load()
        if loaded is not None:
            use(loaded)


@FUZZ
@given(seed=st.integers(0, 10**9), name=st.sampled_from((INDEX, TENSORS)))
@example(seed=0, name=TENSORS)
def test_any_byte(whole, seed, name):
    draw = random.Random(seed)
    folder, scores, statistics = whole
    with Copy(folder) as copy:
        content = bytearray((copy.at / name).read_bytes())
        how, at = draw.choice(("flip", "flip", "cut", "insert", "append", "empty")), draw.randrange(len(content))
        if how == "flip":
            content[at] ^= 1 << draw.randrange(8)
        elif how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = draw.randbytes(draw.randrange(1, 9))
        elif how == "append":
            content += draw.randbytes(draw.randrange(1, 9))
        else:
            content.clear()
        (copy.at / name).write_bytes(content)
        loaded = copy.load()
        if loaded is not None:
            assert same(loaded[0], scores)
            assert same(loaded[1], statistics)


DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn)


def other_tensors(tensors, draw):
    """The same tensors with one of them gone, renamed, reshaped, poisoned, of another dtype or of another group."""
    name = draw.choice(list(tensors))
    value = tensors[name]
    how = draw.choice(("drop", "rename", "dtype", "short", "flat", "long", "nan", "inf", "swap", "empty", "none"))
    if how in ("drop", "rename"):
        del tensors[name]
    if how == "rename":
        tensors[draw.choice(("values/x", "x", "fine/x", "fine/third/" + name, "coarse/", "/", "loss/", "values"))] = (
            value
        )
    elif how == "dtype":
        tensors[name] = value.to(draw.choice(DTYPES))
    elif how == "short":
        tensors[name] = value[:-1].contiguous()
    elif how == "flat":
        tensors[name] = value.reshape(-1, 1)
    elif how == "long":
        tensors[name] = torch.cat([value, value])
    elif how in ("nan", "inf"):
        value.view(-1)[draw.randrange(value.numel())] = float(how)
    elif how == "swap":
        other = draw.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif how == "empty":
        tensors[name] = value[:0].contiguous()
    elif how == "none":
        tensors.clear()
    return how


@FUZZ
@given(seed=st.integers(0, 10**9), signed=st.booleans())
@example(seed=0, signed=True)
def test_other_tensors(whole, seed, signed):
    draw = random.Random(seed)
    folder, scores, statistics = whole
    with Copy(folder) as copy:
        tensors = load_file(copy.at / TENSORS)
        tensors = {k: v.clone() for k, v in tensors.items()}
        how = other_tensors(tensors, draw)
        save_file(tensors, copy.at / TENSORS)
        copy.write(copy.index, signed=signed)
        loaded = copy.load()
        if loaded is None:
            return
        if signed:
            assert how == "swap" or same(loaded[0], scores), how
            use(loaded)
        else:
            assert same(loaded[0], scores)
            assert same(loaded[1], statistics)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"[" * 200_000, "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[]", "expected an object, got list"),
        (b'{"format": 1' + b"0" * 5000 + b"}", "damaged"),
        (b'{"format": true}', "expected an object with a format"),
        (b'{"format": 2, "groups": []}', "was scored by an older version of this package"),
        (b'{"format": 1}', "was scored by an older version of this package"),
        (b'{"format": 99}', "was scored by a newer version of this package"),
        (b'{"format": 3}', "expected a digest of its content"),
        (b'{"format": 3, "sha256": "0"}', "its content is not what its digest says"),
        (b'{"format": 3, "sha256": 0}', "its content is not what its digest says"),
    ],
)
def test_indexes_that_are_none(whole, content, message):
    with Copy(whole[0]) as copy:
        (copy.at / INDEX).write_bytes(content)
        with pytest.raises(HywiaError, match=message):
            hk.load_scores(copy.at)


def test_files_of_two_scorings_do_not_go_together(whole, tmp_path):
    folder, scores, _ = whole
    hk.save_scores(tmp_path / "other", dataclasses.replace(scores, values=dict(scores.loss)))
    with Copy(folder) as copy:
        shutil.copyfile(tmp_path / "other" / TENSORS, copy.at / TENSORS)
        with pytest.raises(HywiaError, match=r"scores\.safetensors: cut short, changed, or not written with this"):
            hk.load_scores(copy.at)


def test_statistics_of_other_scores_are_not_saved(whole, tmp_path):
    _, scores, statistics = whole
    with pytest.raises(HywiaError, match="statistics: expected those the scores came from"):
        hk.save_scores(tmp_path / "s", scores, dataclasses.replace(statistics, fingerprint="other"))
    assert not (tmp_path / "s").exists()


def test_a_file_that_cannot_be_read_is_named(whole, monkeypatch):
    def refused(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(HywiaError, match=r"cannot read .*scores\.json: Permission denied"):
        hk.load_scores(whole[0])


def test_groups_of_another_model_are_refused_when_used(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = hk.load("model")[0]
    scores = hk.score(model, criterion="random")
    groups = tuple(dataclasses.replace(g, layer=g.layer + 1) for g in scores.groups)
    hk.save_scores("other", dataclasses.replace(scores, groups=groups, layers=None))
    assert main(["prune", "model", "-o", "out", "--ratio", "0.2", "--scores", "other", "--no-eval"]) == 1
    out, err = capsys.readouterr()
    assert "scores: expected the groups of units that this model has, got others" in err
    assert "removing" not in out  # nothing was planned
    with pytest.raises(HywiaError, match="made for another model"):
        hk.prune(model, hk.plan(hk.load_scores("other")[0], ratio=0.2, align=8))


def test_scores_whose_record_says_nothing_take_the_defaults(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    statistics = hk.calibrate(hk.load("model")[0], TEXT)
    hk.save_scores("s", dataclasses.replace(hk.fuse(statistics), record={}), statistics)
    how = ["--scores", "s", "--no-eval", "--no-refit", "--ratio", "0.2", "--align", "8"]
    assert main(["prune", "model", "-o", "out", *how, "--order", "first"]) == 0
    assert hk.load("out")[0].config.intermediate_size < 56


CONTENT = {"plan": {"widths": {"mlp": [8, 8]}, "ratio": 0.2}, "kept_units": {"a": [0, 2]}, "tuple": (1, 2), "n": {1: 2}}


@FUZZ
@given(seed=st.integers(0, 10**9), times=st.integers(1, 3))
@example(seed=0, times=1)
def test_any_change_of_a_sealed_record_is_seen(seed, times):
    draw = random.Random(seed)
    content = record.sealed(CONTENT)
    changed = mutated(json.loads(json.dumps(content)), draw, times)
    data = bytearray(json.dumps(changed).encode())
    if draw.random() < 0.3:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    try:
        got = record.parsed(bytes(data), "hywia.json")
    except HywiaError as error:
        said = str(error)
    else:
        assert got == content or "sha256" not in got
        return
    assert said.startswith("hywia.json is damaged: ")


def test_a_sealed_record_is_read_as_it_was():
    content = record.sealed(CONTENT)
    assert record.parsed(json.dumps(content, indent=3).encode(), "x") == content
    assert content["n"] == {"1": 2}
    assert record.sealed(content) == content
    assert record.parsed(b'{"a": 1}', "x") == {"a": 1}, "records of older versions have no digest"
