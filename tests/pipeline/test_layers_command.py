"""`hywia prune --units layers`: what is printed, written, recorded, refused, cut again, measured and exported."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.checkpoint.decilm import write_decilm
from hywia_kernels.checkpoint.gguf import write_gguf
from hywia_kernels.cli import main
from hywia_kernels.deploy.serving_rules import pattern_note
from tests.support.comparison import logits, relative
from tests.support.cuts import layer_plan
from tests.support.families import fresh_named, token_ids
from tests.support.models import random_model, sizes
from tests.support.tiny import TINY, fresh
from tests.support.tokenizers import write_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
SMALL = ["--calib", "text.txt", "--samples", "4", "--seq-len", "16"]


@pytest.fixture
def here(tmp_path, tokenizer, monkeypatch):
    """A model of five layers, and a text."""
    model = random_model(**sizes(259, 48, 56, 5, 6, 3), initializer_range=0.15, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def test_layers_go_by_command(here, capsys):
    request = ["prune", "model", "--ratio", "0.3", "--units", "layers", *SMALL, "--refit-samples", "8"]
    request += ["--text", "text.txt", "--block", "16", "--max-blocks", "3", "--json", "out.json", "-o", "out"]
    assert main(request) == 0
    out = capsys.readouterr().out
    record = json.loads((here / "out" / "hywia.json").read_text())
    gone = record["plan"]["depth"]["gone"]
    assert f"  layers: 5 -> 3 (without {gone[0]}, {gone[1]})\n" in out
    assert "  mlp: 56 -> 56 channels a layer\n" in out
    assert record["kept_units"]["layers"] == record["plan"]["depth"]["kept"] == [i for i in range(5) if i not in gone]
    influence = record["plan"]["scores"]["layers"]["influence"]
    assert sorted(sorted(range(5), key=influence.__getitem__)[:2]) == gone
    assert record["plan"]["scores"]["layers"]["samples"] == 4
    assert (record["plan"]["widths"]["layers"], record["plan"]["widths_before"]["layers"]) == ([3], [5])
    assert [w == 0 for w in record["plan"]["widths"]["mlp"]] == [i in gone for i in range(5)]
    assert record["recipe"]["units"] == ["layers"]
    assert record["scores_summary"] == []
    assert "scoring" in record["seconds"]
    assert record["seconds"]["layer ranking"] > 0
    report = json.loads((here / "out.json").read_text())
    assert report["plan"]["depth"]["gone"] == gone
    assert report["after"]["parameters"] == report["plan"]["parameters_after"]
    card = (here / "out" / "README.md").read_text()
    assert "| layers | 5 | 3 |" in card
    assert "| mlp | 56 | 56 |" in card
    config = json.loads((here / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["model_type"]) == (3, "llama")
    assert main(["report", "out"]) == 0
    page = (here / "out.html").read_text()
    assert re.search(r">layers</th>\s*<td>5</td>\s*<td>3</td>", page)
    assert f"layers that went</th><td>{gone[0]}, {gone[1]}" in re.sub(r">\s+<", "><", page)


def test_layers_and_other_units_by_shares(here, capsys):
    request = [
        "prune",
        "model",
        "-o",
        "out",
        "--group-ratio",
        "layers=0.2,mlp=0.5",
        *SMALL,
        "--align",
        "4",
        "--no-eval",
    ]
    assert main([*request, "--refit-samples", "8"]) == 0
    record = json.loads((here / "out" / "hywia.json").read_text())
    assert record["plan"]["widths"]["layers"] == [4]
    assert {row["layer"] for row in record["scores_summary"]} == set(record["kept_units"]["layers"])
    assert "  layers: 5 -> 4 (without " in capsys.readouterr().out
    model, _ = hk.load("out")
    assert len(model.model.layers) == 4


def test_a_dry_run_says_how_many_layers(here, capsys, monkeypatch):
    monkeypatch.setattr("hywia_kernels.cli.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    request = ["prune", "model", "--ratio", "0.3", "--units", "layers", *SMALL, "--no-eval", "--dry-run"]
    assert main([*request, "--json", "d.json"]) == 0
    report = json.loads((here / "d.json").read_text())
    assert "  layers: 5 -> 3\n" in capsys.readouterr().out
    assert report["plan"]["widths"]["layers"] == [3]
    assert report["estimate"]["seconds"].keys() >= {"layer ranking", "reconstruction", "cutting"}
    assert "scoring" not in report["estimate"]["seconds"]
    assert main(["prune", "model", "--ratio", "0.3", *SMALL, "--no-eval", "--dry-run", "--json", "w.json"]) == 0
    assert "layer ranking" not in json.loads((here / "w.json").read_text())["estimate"]["seconds"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ratio", "0.97", "--units", "layers"], "ratio: 0.97 cannot be reached to within one step"),
        (
            ["--ratio", "0.3", "--units", "layers", "--fusion", "learned"],
            "fusion: learned goes with units inside layers",
        ),
        (["--group-ratio", "layers=0.05"], "group_ratio: 0.05 rounds to nothing"),
        (["--ratio", "0.3", "--units", "layer"], "did you mean 'layers'?"),
    ],
)
def test_requests_that_cannot_be_met(here, capsys, flags, said):
    assert main(["prune", "model", "-o", "out", *flags, *SMALL, "--no-eval"]) == 2
    assert said in capsys.readouterr().err
    assert not (here / "out").exists()


def test_cuts_of_layers_follow_each_other(here, capsys):
    """Of the second one the console and the record say what went since the original."""
    flags = ["--units", "layers", *SMALL, "--refit-samples", "8", "--no-eval"]
    assert main(["prune", "model", "-o", "one", "--ratio", "0.15", *flags]) == 0
    assert main(["prune", "one", "-o", "two", "--ratio", "0.2", *flags]) == 0
    assert "in 2 cuts" in capsys.readouterr().out
    record = json.loads((here / "two" / "hywia.json").read_text())
    assert [len(s) for s in (record["history"], record["kept_units"]["layers"])] == [1, 3]
    model, _ = hk.load("two")
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_a_reconstruction_leads_nearer_to_the_dense_model(here):
    model, tokenizer = hk.load("model")
    text = hk.calibration(model, tokenizer, "text.txt", samples=24, seq_len=16, fewer=True)
    plan = layer_plan(model, (0, 1, 4))
    want = logits(model, text)
    cut, refitted = copy.deepcopy(model), copy.deepcopy(model)
    hk.prune(cut, plan)
    after = hk.reconstruct(refitted, plan, text)
    errors = after.record["refit"]["relative_error"]
    assert errors
    assert all(new < old for old, new in errors.values())
    between = logits(refitted, text)
    hk.prune(refitted, after)
    assert relative(logits(refitted, text), between) <= 1e-5
    assert relative(between, want) < 0.95 * relative(logits(cut, text), want)


def test_learned_masks_see_the_layers_that_are_gone(here):
    recipe = hk.Recipe(
        group_ratio={"layers": 0.2, "mlp": 0.5}, calibration="text.txt", samples=4, seq_len=16, fusion="learned",
        steps=2, align=4, layout="uniform", reconstruct=False,
    )  # fmt: skip
    model, tokenizer = hk.load("model")
    result = hk.compress(model, tokenizer, recipe)
    assert len(model.model.layers) == 4
    start = result.scores.record["learned"]["divergence"][0]
    masked = hk.load("model")[0]
    dense = copy.deepcopy(masked)
    blended = hk.fuse(hk.calibrate(dense, result_text(dense, tokenizer)), "attention")  # where learning starts
    first = hk.plan(hk.rank_layers(blended, result.scores.layers), group_ratio=recipe.group_ratio, align=4)
    hk.mask(masked, first)
    rows = result_text(dense, tokenizer, 32)[:16]
    with torch.no_grad():
        whole, less = (torch.log_softmax(m(rows).logits.double(), -1) for m in (dense, masked))
    assert start == pytest.approx(float((whole.exp() * (whole - less)).sum(-1).mean()), rel=1e-3)


def result_text(model, tokenizer, samples=4):
    text = hk.calibration(model, tokenizer, "text.txt", samples=32, seq_len=16, fewer=True)
    return text[:samples]


def test_exports_hold_the_layers_that_stay(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(259)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = fresh(TINY[2])
    hk.prune(model, layer_plan(model, (0, 2), units=("mlp",), only=2))
    written = write_gguf(model, tmp_path / "vocabulary.gguf", tmp_path / "out.gguf")
    reader = gguf.GGUFReader(written)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["deci.block_count"] == 2
    assert fields["deci.feed_forward_length"] == [56, 32]
    assert {t.name.split(".")[1] for t in reader.tensors if t.name.startswith("blk.")} == {"0", "1"}
    write_decilm(model, None, tmp_path / "decilm")
    config = json.loads((tmp_path / "decilm" / "config.json").read_text())
    assert (config["num_hidden_layers"], len(config["block_configs"])) == (2, 2)
    assert [b["ffn"]["intermediate_size"] for b in config["block_configs"]] == [56, 32]


def test_what_cannot_be_masked_is_refused_before_anything_is_scored(tmp_path, monkeypatch):
    fresh_named("opt-350m").save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    model, tokenizer = hk.load(tmp_path / "model")
    monkeypatch.setattr("hywia_kernels.compression.job.measured_with", lambda *a: pytest.fail("the model was measured"))
    recipe = hk.Recipe(ratio=0.2, units=("layers",))
    with pytest.raises(HywiaError, match="do_layer_norm_before=False"):
        hk.compress(model, tokenizer, recipe)


def test_servers_that_count_types_are_named():
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    assert pattern_note(("vllm", "llama.cpp"), types, (0, 1, 2)) is None
    assert pattern_note(("vllm",), types, (0, 2, 3)) is None
    assert pattern_note(("llama.cpp",), None, (0, 2)) is None
    assert "which llama.cpp counts by" in pattern_note(("llama.cpp.blocks",), types, (0, 2, 3))
    model = fresh_named("gemma2")
    scores = hk.rank_layers(hk.score(model, criterion="random"), hk.layer_influence(model, token_ids()))
    plan = hk.plan_for(scores, ratio=0.2, units=("layers",))
    told = hk.deploy.planning.with_prediction(plan, model, "cpu").record
    moved = model.config.layer_types != [model.config.layer_types[i] for i in plan.depth.keep] + ["sliding_attention"]
    assert ("note" in told) == (plan.depth.keep != (0, 1) and moved)
