"""The quality benchmark: each baseline against its definition, tasks against a plain loop, and the command."""

from __future__ import annotations

import copy
import json
import math
import statistics

import pytest
import torch
from torch.nn import functional

import hywia_kernels as hk
from hywia_kernels.method.surgery import zero_units
from tests.support.tokenizers import byte_tokenizer

from . import bench_recipe, cuts, llm_pruner, models, peers, quality, tasks
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
    entered = {}
    hooks = [
        model.get_submodule(g.members[-1].module).register_forward_pre_hook(
            lambda _, arguments, name=g.name: entered.update({name: arguments[0].flatten(0, 1).double()})
        )
        for g in hk.groups(model)
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return entered


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
        entered = entering(again, tokens)
        for group in (g for g in hk.groups(model) if g.layer == layer):
            weight = model.get_submodule(group.members[-1].module).weight.detach().double()
            norm = entered[group.name].square().mean(0).sqrt()
            score = (weight.abs() * norm).mean(0).view(group.units, -1).sum(1)
            keep = score.argsort(descending=True)[: group.units // 2].sort().values
            assert torch.equal(plan.keep[group.name], keep), group.name
            zero_units(again, group, keep)
    assert plan.parameters_after == plan.parameters_before - sum(
        g.units // 2 * g.unit_parameters for g in hk.groups(model)
    )


def test_flap_ranks_over_layers_and_keeps_the_mean_output(model, tokens):
    flap = peers.flap(model, tokens, {"mlp": 0.5}, LAYERS)
    entered = entering(model, tokens)
    scores = {}
    for group in (g for g in hk.groups(model) if g.kind == "mlp"):
        weight = model.get_submodule(group.members[-1].module).weight.detach().double()
        metric = entered[group.name].var(0, correction=0) * weight.square().sum(0)
        scores[group.name] = (metric - metric.mean()) / metric.std()
    cut = torch.cat(list(scores.values())).sort().values[len(scores) * 176 // 2]
    for name, score in scores.items():
        assert flap.plan.keep[name].tolist() == (score >= cut).nonzero()[:, 0].tolist()
    assert sum(flap.plan.widths("mlp")) == 176
    assert flap.plan.widths("attention") == [2, 2]
    first = model.model.layers[0].mlp.down_proj
    dense = (entered["model.layers.0.mlp"] @ first.weight.double().T).mean(0)
    keep = flap.plan.keep["model.layers.0.mlp"]
    left = (entered["model.layers.0.mlp"][:, keep] @ first.weight.double()[:, keep].T).mean(0)
    bias = flap.biases["model.layers.0.mlp.down_proj"].double()
    assert torch.allclose(left + bias, dense, atol=1e-6)
    with torch.no_grad(), peers.biased(model, flap.biases):
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


def test_standard_errors_are_those_of_means_over_questions():
    answers = {"piqa": [1, 0, 0, 1, 1], "boolq": [1, 1, 0, 0]}  # right or not
    percent = {name: 100.0 * statistics.mean(told) for name, told in answers.items()}
    got = tasks.figures(percent, {name: len(told) for name, told in answers.items()})
    errors = {name: 100.0 * statistics.stdev(told) / math.sqrt(len(told)) for name, told in answers.items()}
    assert {name: got[f"{name}_se"] for name in answers} == pytest.approx(errors)
    assert got["mean"] == pytest.approx((60.0 + 50.0) / 2)
    assert got["mean_se"] == pytest.approx(math.hypot(*errors.values()) / 2)
    assert set(got) <= tasks.PERCENTS.keys() | tasks.ERRORS.keys()
    assert tasks.figures({"piqa": 100.0}, {"piqa": 1}) == {"piqa": 100.0, "mean": 100.0}


def test_a_context_begins_with_what_the_tokenizer_puts_before_a_text(folder):
    class Beginning:
        bos_token_id = 256

        def __init__(self):
            self.inner = byte_tokenizer(special=False)

        def __call__(self, text, add_special_tokens=True, **options):
            ids = list(self.inner(text, **options)["input_ids"])
            return {"input_ids": [256, *ids] if add_special_tokens else ids}

    plain, begun = (tasks.read(folder, t) for t in (byte_tokenizer(special=False), Beginning()))
    for one, other in zip(plain, begun, strict=True):
        assert [[256, *c.tokens] for c in one.choices] == [c.tokens for c in other.choices]
        assert [c.scored for c in one.choices] == [c.scored for c in other.choices]


def test_the_command_measures_and_leaves_the_model_whole(model, tokenizer, folder, capsys):
    text = folder / "text.txt"
    text.write_text("a quick brown fox jumps over the lazy dog, and then it sleeps. " * 60)
    criteria = ["random", "magnitude", "lp:param_second", "wanda-sp@4", "flap@4", "attention", "recipe@4", "fine:first"]
    other = folder / "other.txt"
    other.write_text("no fox is here, and no dog sleeps; but the cat sat. " * 20)
    options = ["--calib", str(text), "--text", str(text), str(other), "--block", "16", "--max-blocks", "6"]
    options += ["--layers", "0:2"]
    options += ["--seeds", "0", "1", "--settings", "A50", "--csv", str(folder / "q.csv"), "--tasks", str(folder)]
    options += ["--figure", str(folder / "q.html"), "--only", *criteria]
    arguments = quality._arguments(["--device", "cpu", *options])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = quality.run(arguments, model, tokenizer, options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [r.criterion for r in rows[:16:2]] == [c.partition("@")[0] for c in criteria]
    assert len(rows) == 32
    assert [r.text for r in rows] == ["text.txt", "other.txt"] * 16
    assert all(r.recovery == "none" and r.tokens_trained is None and r.divergence is None for r in rows)
    assert all(a.mean == b.mean and a.seconds == b.seconds > 0 for a, b in zip(rows[::2], rows[1::2], strict=True))
    written = read(folder / "q.csv")
    assert [r["criterion"] for r in written[:2]] == ["dense", "dense"]
    assert [float(r["perplexity"]) for r in written[2:]] == pytest.approx([r.perplexity for r in rows], rel=1e-3)
    share = 80 / 176  # of 176 channels 96 stay, a multiple of 16
    group = next(g for g in hk.groups(model) if g.kind == "mlp")
    total = sum(p.numel() for p in model.parameters())
    uniform = [r for r in rows if r.criterion in ("random", "attention", "recipe")]
    assert all(r.removed == pytest.approx(2 * 80 * group.unit_parameters / total) for r in uniform), share
    printed = capsys.readouterr().out
    assert printed.count("| recipe@4 |") == 2  # a table each text
    page = (folder / "q.html").read_text()
    assert page.count("<svg") == 2
    assert "hybrid" in page


def test_several_lengths_of_blocks_give_a_row_each(model, tokenizer, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a quick brown fox jumps over the lazy dog, and then it sleeps. " * 20)
    options = ["--device", "cpu", "--calib", str(text), "--text", str(text), "--block", "16", "64", "--seeds", "0"]
    options += ["--layers", "0:2", "--settings", "A50", "--only", "magnitude", "--csv", str(tmp_path / "q.csv")]
    rows = quality.run(quality._arguments(options), model, tokenizer, options)
    count = len(tokenizer(text.read_text())["input_ids"])
    assert [(r.block, r.blocks) for r in rows] == [(16, count // 16), (64, count // 64)]
    written = read(tmp_path / "q.csv")
    assert [(r["criterion"], r["block"]) for r in written] == [
        ("dense", "16"), ("dense", "64"), ("magnitude", "16"), ("magnitude", "64"),
    ]  # fmt: skip
    for row in written[:2]:
        length = int(row["block"])
        ids = torch.tensor(list(tokenizer(text.read_text())["input_ids"]))[: count // length * length]
        assert float(row["perplexity"]) == pytest.approx(hk.perplexity(model, ids.view(-1, length)), rel=1e-4)
    printed = capsys.readouterr().out
    assert "text.txt, blocks of 16\n\n| criterion |" in printed
    assert "text.txt, blocks of 64\n\n| criterion |" in printed
    assert quality._arguments(["--device", "cpu", "--calib", "x", "--text", "x"]).block == [128]


def test_the_table_is_the_geometric_mean_over_seeds_and_settings():
    run = Environment.record(torch.device("cpu"), "module", [], 0)
    made = [
        Row(run, {"criterion": "x", "samples": 10, "setting": s, "perplexity": p, "mean": m})
        for s, p, m in (("A25", 10.0, 40.0), ("A25", 40.0, 41.0), ("A50", 80.0, None))
    ]
    assert quality.table(made).splitlines()[-1] == f"| x@10 | 20 | 80 | {math.sqrt(1600):.4g} | 40.50 |"
    told = {"criterion": "x", "samples": 10, "setting": "P50", "recovery": "self", "perplexity": 9.0, "mean": 41.0}
    recovered = [Row(run, {**told, "text": text, "mean_se": 0.5}) for text in ("a.txt", "b.txt")]
    line = "| x@10 + self | 9 | 9 | 41.00 ± 0.50 |"
    assert [part for part in quality.table(recovered).splitlines() if part.startswith("| x")] == [line, line]


@pytest.mark.parametrize("name", ["lp:third", "fine:fourth", "wanda", "recipe:first"])
def test_unknown_criteria_are_refused(name):
    with pytest.raises(ValueError, match="expected criteria out of random, magnitude"):
        cuts.split(name)


def test_the_recipe_is_timed_step_by_step(tmp_path):
    path = tmp_path / "recipe.csv"
    options = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--samples", "3", "--csv", str(path)]
    options += ["--reconstruct-samples", "4", "--ratio", "0.2", "--align", "16", "--runs", "2"]
    assert bench_recipe.main([*options, "--recover-tokens", "4096", "--tune", "scales"]) == 0
    made = {row["step"]: row for row in read(path)}
    steps = ["param_mix", "scoring", "head ranking", "search", "planning", "reconstruction", "cut"]
    assert {*steps, "recovery", "all", "recovery text"} <= set(made)
    seconds = {name: float(row["seconds"]) for name, row in made.items()}
    assert all(seconds[name] > 0 for name in steps)
    apart = seconds["param_mix"] + seconds["all"] + seconds["recovery text"]
    assert seconds["all"] == pytest.approx(sum(seconds.values()) - apart, rel=1e-3)
    assert 0 < seconds["recovery text"] < seconds["recovery"]
    assert float(made["scoring"]["times_param_mix"]) == pytest.approx(
        seconds["scoring"] / seconds["param_mix"], rel=1e-3
    )
    assert (made["all"]["tune"], made["all"]["recover_tokens"], made["all"]["weights"]) == ("scales", "4096", "random")
