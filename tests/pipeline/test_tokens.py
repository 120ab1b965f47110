"""What stands at a sample's beginning, how many samples a text gives, and how long a model lets them be."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.cli import main
from hywia_kernels.evaluation import blocks, continuation, tokens_per_second
from hywia_kernels.method.calibration_data import windows
from hywia_kernels.method.tokens import digest, positions, prefix
from tests.support.families import fresh_named
from tests.support.tiny import TINY, fresh


def byte_tokenizer(template: str):
    """Every byte a token; `template` says what stands around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<s>": 256, "</s>": 257, "<pad>": 258}
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | special, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(special.items()))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TEMPLATES = {"$A": [], "<s> $A": [256], "$A </s>": [], "<s> $A </s>": [256], "<s> <pad> $A": [256, 258]}


@pytest.mark.parametrize("template", TEMPLATES)
def test_samples_and_blocks_begin_as_the_tokenizer_begins(template, tmp_path):
    tokenizer, begin = byte_tokenizer(template), TEMPLATES[template]
    assert prefix(tokenizer) == begin
    text = "".join(chr(33 + (i * 7) % 90) for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": text[i : i + 30]}) for i in range(60)))
    for source in ("a.txt", "d.jsonl"):
        for bos, want in ((None, begin), (False, []), (True, begin or [256])):
            got = hk.calibration(None, tokenizer, str(tmp_path / source), samples=9, seq_len=16, bos=bos)
            assert got.shape == (9, 16)
            assert got[:, : len(want)].tolist() == [want] * 9
            assert int(got[:, len(want) :].max()) < 256
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    got = blocks(tokenizer, text, 16)
    rest = 16 - len(begin)
    assert got.shape == (500 // rest, 16)
    assert got[:, : len(begin)].tolist() == [begin] * len(got)
    assert got[:, len(begin) :].flatten().tolist() == ids[: 500 // rest * rest]
    assert blocks(tokenizer, text, 16, bos=False).flatten().tolist() == ids[:496]
    assert blocks(tokenizer, text, 16, bos=True)[:, 0].tolist() == [256] * (500 // 15) or begin == [256, 258]
    with pytest.raises(UsageError, match="expected at least"):
        blocks(tokenizer, text, 2) if len(begin) == 2 else blocks(tokenizer, text, 1)


def test_evaluation_says_on_what_it_was_measured():
    tokenizer, model = byte_tokenizer("<s> $A"), fresh(TINY[2])
    text = "the quick brown fox " * 20
    found = hk.evaluate(model, tokenizer, text, block=32, max_blocks=5, name="fox")
    assert found["text"] == {
        "name": "fox",
        "sha256": "4c81e500c82b112e575c21d7f94b3e9c4f0b4cccfb857d48042a38a516e36b76",
        "blocks": 5,
        "block": 32,
        "tokens": 160,
        "bos": True,
    }
    assert found["perplexity"] == hk.perplexity(model, blocks(tokenizer, text, 32, 5))
    without = hk.evaluate(model, tokenizer, text, block=32, max_blocks=5, bos=False)
    assert without["text"]["bos"] is False
    assert without["perplexity"] == hk.perplexity(model, blocks(tokenizer, text, 32, 5, bos=False))
    assert without["perplexity"] != found["perplexity"]


DOCUMENTS = ["".join(chr(33 + (i * j) % 90) for i in range(5 + j % 60)) for j in range(1, 3500)]


@pytest.mark.parametrize("kind", [list, iter], ids=["list", "stream"])
@pytest.mark.parametrize("length", [16, 50])
def test_fewer_samples_are_a_prefix_of_more(tokenizer, kind, length):
    sizes, rng = (1, 8, 100, 600, 1500), random.Random(1)
    texts = ["".join(rng.choices("abcdefgh", k=5 + j % 60)) for j in range(3500)]
    made = [windows(kind(texts), tokenizer, samples=n, seq_len=length, seed=0) for n in sizes]
    for one, more in itertools.pairwise(made):
        assert torch.equal(one, more[: len(one)])
    rows = {tuple(row) for row in made[-1].tolist()}
    assert len(rows) == 1500, "and they are not the same ones again"


def test_a_stream_that_fits_is_drawn_as_a_list(tokenizer):
    for texts in (DOCUMENTS[:400], ["x" * 333], ["", "x" * 333, " "]):
        one = windows(list(texts), tokenizer, samples=15, seq_len=20, seed=2)
        assert torch.equal(one, windows(iter(texts), tokenizer, samples=15, seq_len=20, seed=2))


def test_endless_streams_without_text_end(tokenizer):
    with pytest.raises(HywiaError, match="holds no text"):
        windows(itertools.repeat(" "), tokenizer, samples=3, seq_len=16, seed=0)
    got = windows(itertools.repeat("abc"), tokenizer, samples=600, seq_len=16, seed=0)
    assert got.shape == (600, 16)


def test_the_same_windows_as_ever(tokenizer):
    """Of lists: figures of earlier runs stay comparable."""
    got = windows(DOCUMENTS[:200], tokenizer, samples=40, seq_len=32, seed=7)
    assert digest(got) == "c461624dbd373f677dd23ca7f2f81279a59eed6771216af57495fb9b68b2f508"


LEARNED = {"gpt2": 64, "opt": 64}


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_neox", "bloom", "phi", "gemma3_text"])
def test_positions(family):
    assert positions(fresh_named(family)) == LEARNED.get(family)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gpt_bigcode", dict(n_embd=32, n_layer=1, n_head=4, n_positions=40)),
        ("gptj", dict(n_embd=32, n_layer=1, n_head=4, n_positions=40, rotary_dim=4)),
        ("biogpt", dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=40)),
    ],
)
def test_tables_of_families_that_are_only_evaluated(kind, sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    common = dict(vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **sizes)).eval()
    assert positions(model) == 40
    assert math.isfinite(hk.perplexity(model, torch.full((1, 40), 5)))
    with pytest.raises(UsageError, match="block: the model has 40 positions, got 41"):
        hk.perplexity(model, torch.full((1, 41), 5))


@pytest.mark.parametrize("family", LEARNED)
def test_longer_than_the_positions_is_refused_before_any_work(family, tokenizer, tmp_path):
    model = fresh_named(family)
    (tmp_path / "a.txt").write_text("hello there " * 90)
    tokens = torch.randint(2, 100, (3, 65))
    plan = hk.plan(hk.score(model, criterion="magnitude"), group_ratio=0.3, units=("mlp",), align=4)
    with pytest.raises(UsageError, match="seq_len: the model has 64 positions, got 65"):
        hk.calibration(model, tokenizer, str(tmp_path / "a.txt"), samples=2, seq_len=65)
    with pytest.raises(UsageError, match="seq_len: the model has 64 positions, got 65"):
        hk.calibration(model, tokenizer, samples=2, seq_len=65)
    for work in (hk.calibrate, hk.head_residuals, lambda m, t: hk.reconstruct(m, plan, t)):
        with pytest.raises(UsageError, match="seq_len: the model has 64 positions, got 65"):
            work(model, tokens)
    with pytest.raises(UsageError, match="block: the model has 64 positions, got 65"):
        hk.perplexity(model, tokens)
    with pytest.raises(UsageError, match="block: the model has 64 positions, got 65"):
        hk.evaluate(model, tokenizer, "hello " * 99, block=65)
    with pytest.raises(UsageError, match="prompt: the model has 64 positions, got 65"):
        continuation(model, tokenizer, "x" * 64)
    assert math.isfinite(hk.perplexity(model, tokens[:, :64]))
    assert tokens_per_second(model, prompt=60, new=32, repeats=1) > 0
    small = byte_tokenizer("$A")
    assert hk.calibration(fresh_named(family), small, str(tmp_path / "a.txt"), samples=2, seq_len=64).shape == (2, 64)


def test_rotary_positions_are_no_limit(tokenizer):
    model = fresh(TINY[2])
    tokens = torch.randint(0, 256, (2, 200))
    assert math.isfinite(hk.perplexity(model, tokens))
    assert hk.calibrate(model, tokens).record["seq_len"] == 200


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    return tmp_path


SCORE = ["score", "model", "-o", "s", "--calib", "text.txt", "--seq-len", "16"]
PRUNE = ["prune", "model", "-o", "p", "--group-ratio", "mlp=0.5", "--align", "4", "--calib", "text.txt"]


def test_a_text_too_short_for_the_default_is_refused(here, capsys):
    assert main(SCORE) == 1
    assert "the text holds 84 samples of 16 tokens, 96 were asked for; give more text, or --samples 84" in (
        capsys.readouterr().err
    )
    assert not (here / "s").exists()
    assert main([*PRUNE, "--seq-len", "16", "--no-refit", "--no-eval"]) == 1
    assert "84 samples of 16 tokens, 96 were asked for" in capsys.readouterr().err
    assert main([*PRUNE, "--seq-len", "16", "--samples", "4", "--refit-samples", "99", "--no-eval"]) == 1
    assert (
        "84 samples of 16 tokens, 99 were asked for; give more text, or --reconstruct-samples 84"
        in capsys.readouterr().err
    )


def test_what_was_used_is_printed_and_recorded(here, capsys):
    assert main([*PRUNE, "--seq-len", "16", "--samples", "4", "--block", "32", "--text", "text.txt"]) == 0
    printed = capsys.readouterr().out
    assert "calibration text: 84 samples, 1,344 tokens, text.txt" in printed
    assert "on 84 samples, 1,344 tokens, in" in printed
    assert "perplexity on 40 blocks of 32 tokens: text.txt" in printed
    record = json.loads((here / "p" / "hywia.json").read_text())
    statistics = record["plan"]["scores"]["statistics"]
    assert [statistics[k] for k in ("samples", "seq_len", "tokens", "bos")] == [4, 16, 64, False]
    assert [record["plan"]["refit"][k] for k in ("samples", "tokens")] == [84, 1344]
    for side in ("before", "after"):
        text = record["evaluation"][side]["text"]
        assert (text["name"], text["blocks"], text["tokens"], text["bos"]) == ("text.txt", 40, 1280, False)
        assert len(text["sha256"]) == 64


def test_bos_on_the_command_line(here):
    for option, want in (("--bos", True), ("--no-bos", False)):
        assert main([*SCORE, "--samples", "4", option, "--overwrite", "--json", "s.json"]) == 0
        assert json.loads((here / "s.json").read_text())["scores"]["statistics"]["bos"] is want
        assert main(["eval", "model", "--text", "text.txt", "--block", "32", option, "--json", "e.json"]) == 0
        assert json.loads((here / "e.json").read_text())["text"]["bos"] is want


def test_the_default_evaluation_text_is_the_packages(here):
    assert main(["eval", "model", "--max-blocks", "2", "--json", "e.json"]) == 0
    assert json.loads((here / "e.json").read_text())["text"] == {
        "name": "Alice's Adventures in Wonderland, chapters I to VI",
        "sha256": "030cdaf378068394f0accc49a8ec7e2d02954bc74124a8697cfe3ccdc9ac4f7c",
        "blocks": 2,
        "block": 128,
        "tokens": 256,
        "bos": False,
    }


def test_json_lines_are_evaluated_as_their_texts(here):
    for name, content in (("e.jsonl", '{"text": "%s"}\n' % ("ab" * 40)), ("e.txt", "ab" * 40)):
        (here / name).write_text(content)
        assert main(["eval", "model", "--text", name, "--block", "32", "--json", f"{name}.json"]) == 0
    one, two = (json.loads((here / f"{name}.json").read_text()) for name in ("e.jsonl", "e.txt"))
    assert one["perplexity"] == two["perplexity"]
    assert one["text"]["sha256"] == two["text"]["sha256"]
