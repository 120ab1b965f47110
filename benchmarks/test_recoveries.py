"""Recoveries of cut models: the same text for all, LLM-Pruner's own against its description."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.nn import functional

import hywia_kernels as hk
from tests.support.tiny import TINY, fresh, make_plan
from tests.support.tokenizers import byte_tokenizer

from . import alpaca
from .recoveries import COLUMNS, Recoveries, apart

ROWS = [
    {"instruction": f"Say {word}", "input": "aloud" if i % 2 else "", "output": f"{word}, {word}"}
    for i, word in enumerate(["one", "two", "three", "four", "five", "six"])
]
SMALL = hk.Recovery(tokens=12 * 8 * 16, text_tokens=40 * 16, seq_len=16, held_out=8, batch=8, checks=3, rate=2e-3)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def pair():
    dense = fresh(TINY[3])
    cut = copy.deepcopy(dense)
    hk.prune(cut, make_plan(cut, "both"))
    return dense, cut


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def kl(dense, cut, ids):
    p, q = (functional.log_softmax(m(ids).logits[:, :-1].double(), -1) for m in (dense, cut))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_each_recovery_starts_from_the_cut_and_reads_the_text_of_its_seed(pair, tokenizer):
    dense, cut = pair
    before = state(cut)
    recoveries = Recoveries(dense, tokenizer, ["none", "lp-own", "self"], SMALL, rows=ROWS)
    held_out = recoveries.held_out(0)
    assert held_out.shape == (8, 16)
    figures = {}
    for done in recoveries.each(cut, 0):
        name = done.figures["recovery"]
        figures[name] = done.figures
        assert done.figures["divergence"] == pytest.approx(kl(dense, done.model, held_out), rel=1e-4)
        changed = [n for n, p in state(done.model).items() if not torch.equal(p, before[n])]
        if name == "none":
            assert done.model is cut
            assert not changed
        elif name == "lp-own":
            assert done.model is not cut
            assert {n.split(".")[-2] for n in changed} == set(alpaca.TARGETS)
        assert set(done.figures) <= COLUMNS.keys()
    assert figures["none"] == {"recovery": "none", "divergence": figures["none"]["divergence"]}
    assert figures["self"]["divergence"] < 0.97 * figures["none"]["divergence"]
    assert figures["self"]["tokens_trained"] == 12 * 8 * 16
    assert figures["lp-own"]["text_seconds"] is None
    assert figures["self"]["recovery_seconds"] > 0 < figures["self"]["text_seconds"]
    # Another criterion of the seed is recovered on the very text; another seed has its own.
    first = recoveries.text("self", 0)
    assert recoveries.text("self", 0)[0] is first[0]
    other = recoveries.text("self", 1)[0]
    assert other.train.shape == first[0].train.shape
    assert not torch.equal(other.train, first[0].train)


def test_text_at_hand_takes_the_place_of_every_source(pair):
    dense, cut = pair
    ids = torch.randint(0, 256, (40, 16), generator=torch.Generator().manual_seed(4))
    recoveries = Recoveries(dense, None, ["self"], SMALL, written=lambda request: ids)
    (done,) = recoveries.each(cut, 0)
    assert torch.equal(recoveries.held_out(0), ids[-8:])
    assert done.figures["divergence"] == pytest.approx(apart(cut, dense, ids[-8:]))
    with pytest.raises(SystemExit, match="lp-own needs a tokenizer and --alpaca FILE"):
        Recoveries(dense, None, ["lp-own"], SMALL)


def test_a_prompt_has_an_opening_and_headed_parts():
    with_input = alpaca.prompt({"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert with_input.startswith("Below is an instruction that describes a task, paired with an input that provides")
    assert with_input.endswith("request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n")
    without = alpaca.prompt({"instruction": "Add.", "input": "", "output": "3"})
    assert without.startswith("Below is an instruction that describes a task. Write a response that")
    assert without.endswith("request.\n\n### Instruction:\nAdd.\n\n### Response:\n")


def test_answers_alone_are_learned(tokenizer):
    row = {"instruction": "Add.", "input": "", "output": "three"}
    made = alpaca.encoded(row, tokenizer)
    before = len(alpaca.prompt(row).encode())
    assert made["labels"][:before] == [-100] * before
    assert made["labels"][before:] == made["input_ids"][before:]
    assert tokenizer.decode(made["input_ids"][before:]) == "three</s>"
    long = alpaca.encoded({**row, "output": "x" * 400}, tokenizer)
    assert len(long["input_ids"]) == alpaca.LONGEST
    assert long["input_ids"][-1] != tokenizer.eos_token_id
    batch = alpaca.collated([made, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["attention_mask"].sum(1).tolist() == [len(made["input_ids"]), 3]
    assert batch["labels"][1].tolist() == [-100, 6, 7] + [-100] * (batch["labels"].shape[1] - 3)


@torch.no_grad()
def loss(model, rows, tokenizer):
    batch = alpaca.collated([alpaca.encoded(row, tokenizer) for row in rows])
    return float(model(**batch).loss)


def test_its_own_recovery_learns_the_answers_and_leaves_a_plain_model(pair, tokenizer, monkeypatch):
    _, cut = pair
    modules = [(n, type(m)) for n, m in cut.named_modules()]
    at_first = loss(cut, ROWS, tokenizer)
    monkeypatch.setattr(alpaca, "RATE", 2e-2)
    monkeypatch.setattr(alpaca, "WARM_UP", 1)
    monkeypatch.setattr(alpaca, "EPOCHS", 12)
    monkeypatch.setattr(alpaca, "EVERY", 4)
    done = alpaca.recover(cut, tokenizer, ROWS, seed=3)
    assert loss(cut, ROWS, tokenizer) < 0.8 * at_first
    assert [(n, type(m)) for n, m in cut.named_modules()] == modules
    assert all(p.requires_grad for p in cut.parameters())
    assert not cut.training
    assert done.steps == 12  # five rows of six are one step an epoch
    assert len(done.losses) == 3
    lengths = sorted(len(alpaca.encoded(row, tokenizer)["input_ids"]) for row in ROWS)
    assert 12 * sum(lengths[:-1]) <= done.tokens <= 12 * sum(lengths[1:])


def test_files_that_hold_no_rows_are_refused(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(ROWS))
    assert alpaca.read(path) == ROWS
    for text, said in (
        ("{", "cannot read"),
        ("[]", "a list of at least two rows"),
        (json.dumps([*ROWS, {"instruction": "x", "output": "y"}]), "row 7: expected texts under instruction, input"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit, match=said):
            alpaca.read(path)
