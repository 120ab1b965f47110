"""The quality benchmark: each baseline against its definition, tasks against a plain loop, and the command."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch.nn import functional

import hywia_kernels as hk
from hywia_kernels.method import surgery
from tests.support.tokenizers import byte_tokenizer

from . import bench_recipe, llm_pruner, models, peers, quality, tasks
from .environment import Environment
from .rows import Row, read

LAYERS = range(0, 2)
SHARES = {"mlp": 0.5, "attention": 0.5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return models.build("tiny", None, "float32", torch.device("cpu"))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(special=False)


def entering(model, tokens):
    """Group name -> what enters its output matrix, float64 `[tokens, inputs]`, by plain hooks."""
    seen = {}
    hooks = [
        model.get_submodule(g.members[-1].module).register_forward_pre_hook(
            lambda _, arguments, name=g.name: seen.update({name: arguments[0].flatten(0, 1).double()})
        )
        for g in hk.groups(model)
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("taylor", ["param_first", "param_second", "param_mix"])
def test_llm_pruner_from_statistics_ranks_as_its_own_flow(model, tokens, taylor):
    network = copy.deepcopy(model)
    want = llm_pruner.score(network, tokens, taylor)
    got = peers.llm_pruner(hk.calibrate(model, tokens), taylor)
    for name, value in got.values.items():
        ratio = want[name] / value
        scale = 2.0 if taylor == "param_second" else 1.0
        assert torch.allclose(ratio, torch.full_like(ratio, scale), rtol=2e-3), name


def test_vectorize_is_the_absolute_signed_sum_of_every_matrix(model, tokens):
    network = copy.deepcopy(model)
    llm_pruner.loss(network, tokens).backward()
    got = peers.llm_pruner(hk.calibrate(model, tokens), "vectorize")
    for group in hk.groups(model):
        want = 0.0
        for member in group.members:
            weight = network.get_submodule(member.module).weight
            signed = (weight * weight.grad).sum(1 - member.axis)
            want = want + signed.view(group.units, -1).sum(1).abs()
        assert torch.allclose(got.values[group.name], want.detach(), rtol=2e-3, atol=1e-9)


def test_wanda_sp_scores_what_the_pruned_layers_before_leave(model, tokens):
    network = copy.deepcopy(model)
    plan = peers.wanda_sp(network, tokens, SHARES, LAYERS)
    again = copy.deepcopy(model)
    for layer in LAYERS:
        seen = entering(again, tokens)
        for group in (g for g in hk.groups(model) if g.layer == layer):
            weight = model.get_submodule(group.members[-1].module).weight.detach().double()
            norm = seen[group.name].square().mean(0).sqrt()
            score = (weight.abs() * norm).mean(0).view(group.units, -1).sum(1)
            keep = score.argsort(descending=True)[: group.units // 2].sort().values
            assert torch.equal(plan.keep[group.name], keep), group.name
            surgery.zero_units(again, group, keep)
    assert plan.parameters_after == plan.parameters_before - sum(
        g.units // 2 * g.unit_parameters for g in hk.groups(model)
    )


def test_flap_ranks_over_layers_and_keeps_the_mean_output(model, tokens):
    found = peers.flap(model, tokens, {"mlp": 0.5}, LAYERS)
    seen = entering(model, tokens)
    scores = {}
    for group in (g for g in hk.groups(model) if g.kind == "mlp"):
        weight = model.get_submodule(group.members[-1].module).weight.detach().double()
        metric = seen[group.name].var(0, correction=0) * weight.square().sum(0)
        scores[group.name] = (metric - metric.mean()) / metric.std()
    cut = torch.cat(list(scores.values())).sort().values[len(scores) * 176 // 2]
    for name, score in scores.items():
        assert found.plan.keep[name].tolist() == (score >= cut).nonzero()[:, 0].tolist()
    assert sum(found.plan.widths("mlp")) == 176
    assert found.plan.widths("attention") == [2, 2]
    first = model.model.layers[0].mlp.down_proj
    dense = (seen["model.layers.0.mlp"] @ first.weight.double().T).mean(0)
    keep = found.plan.keep["model.layers.0.mlp"]
    left = (seen["model.layers.0.mlp"][:, keep] @ first.weight.double()[:, keep].T).mean(0)
    bias = found.biases["model.layers.0.mlp.down_proj"].double()
    assert torch.allclose(left + bias, dense, atol=1e-6)
    with torch.no_grad(), peers.biased(model, found.biases):
        shifted = model.model.layers[0].mlp.down_proj(torch.zeros(1, 176))
    assert torch.allclose(shifted.double(), bias[None], atol=1e-6)


QUESTIONS = {
    "piqa": {"context": "a cat", "choices": [" sat", " flew away at once"], "gold": 0},
    "boolq": {"context": "so it is", "choices": [" no", " yes"], "gold": 1},
    "winogrande": {"context": ["the dog", "the long-haired dog"], "choices": [" barks.", " barks."], "gold": 1},
}


@pytest.fixture
def folder(tmp_path):
    for name, row in QUESTIONS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for _ in range(2)))
    return tmp_path


def test_tasks_are_scored_as_a_plain_loop_scores_them(model, tokenizer, folder):
    read_tasks = tasks.read(folder, tokenizer)
    assert [t.name for t in read_tasks] == ["boolq", "piqa", "winogrande"]
    for task in read_tasks:
        got = tasks.likelihoods(model, task.choices, batch_tokens=40)
        row, best = QUESTIONS[task.name], None
        for i, choice in enumerate(row["choices"]):
            context = row["context"] if isinstance(row["context"], str) else row["context"][i]
            ids = torch.tensor([tokenizer(context + choice)["input_ids"]])
            own = len(tokenizer(choice)["input_ids"])
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].double()
            losses = functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            want = -float(losses[-own:].sum())
            assert float(got[i]) == pytest.approx(want, rel=1e-5)
            value = want / (1 if task.name in tasks.NOT_NORMALISED else len(choice) - 1)
            best = max(best or (value, i), (value, i), key=lambda pair: pair[0])
        assert tasks.accuracy(task, got) == (100.0 if best[1] == row["gold"] else 0.0)
    evaluated = tasks.evaluate(model, read_tasks)
    assert evaluated["mean"] == pytest.approx(sum(evaluated[t.name] for t in read_tasks) / 3)


def test_the_command_measures_and_leaves_the_model_whole(model, tokenizer, folder, capsys):
    text = folder / "text.txt"
    text.write_text("a quick brown fox jumps over the lazy dog, and then it sleeps. " * 60)
    criteria = ["random", "magnitude", "lp:param_second", "wanda-sp@4", "flap@4", "attention", "recipe@4", "fine:first"]
    options = ["--calib", str(text), "--text", str(text), "--block", "16", "--max-blocks", "6", "--layers", "0:2"]
    options += ["--seeds", "0", "1", "--settings", "A50", "--csv", str(folder / "q.csv"), "--tasks", str(folder)]
    options += ["--figure", str(folder / "q.html"), "--only", *criteria]
    arguments = quality._arguments(["--device", "cpu", *options])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = quality.run(arguments, model, tokenizer, options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [r.criterion for r in rows[:8]] == [c.partition("@")[0] for c in criteria]
    assert len(rows) == 16
    written = read(folder / "q.csv")
    assert written[0]["criterion"] == "dense"
    assert [float(r["perplexity"]) for r in written[1:]] == pytest.approx([r.perplexity for r in rows], rel=1e-3)
    share = 80 / 176  # of 176 channels 96 stay, a multiple of 16
    group = next(g for g in hk.groups(model) if g.kind == "mlp")
    total = sum(p.numel() for p in model.parameters())
    uniform = [r for r in rows if r.criterion in ("random", "attention", "recipe")]
    assert all(r.removed == pytest.approx(2 * 80 * group.unit_parameters / total) for r in uniform), share
    printed = capsys.readouterr().out
    assert "| recipe@4 |" in printed
    page = (folder / "q.html").read_text()
    assert page.count("<svg") == 2
    assert "hybrid" in page


def test_the_table_is_the_geometric_mean_over_seeds_and_settings():
    run = Environment.record(torch.device("cpu"), "module", [], 0)
    made = [
        Row(run, {"criterion": "x", "samples": 10, "setting": s, "perplexity": p, "mean": m})
        for s, p, m in (("A25", 10.0, 40.0), ("A25", 40.0, 41.0), ("A50", 80.0, None))
    ]
    assert quality.table(made).splitlines()[-1] == f"| x@10 | 20 | 80 | {math.sqrt(1600):.4g} | 40.50 |"


@pytest.mark.parametrize("name", ["lp:third", "fine:fourth", "wanda", "recipe:first"])
def test_unknown_criteria_are_refused(name):
    with pytest.raises(ValueError, match="expected criteria out of random, magnitude"):
        quality.split(name)


def test_the_recipe_is_timed_step_by_step(capsys):
    options = [
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--samples",
        "3",
        "--reconstruct-samples",
        "4",
    ]
    assert bench_recipe.main([*options, "--ratio", "0.2", "--align", "16", "--runs", "2"]) == 0
    lines = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|")
    assert set(bench_recipe.STEPS) < set(lines)
    ours = sum(float(lines[name]) for name in ("scoring", "fusion", "planning", "cut"))
    assert float(lines["all but the reconstruction and what goes with it"]) == pytest.approx(ours, abs=0.003)
    assert all(float(lines[name]) > 0 for name in ("param_mix", "scoring", "reconstruction"))
