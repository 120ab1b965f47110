"""Plans that are tried: the one that leaves most of the predictions is taken, and the model is as it was."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from state import assert_same, model_state
from test_passes import Interrupt
from torch.nn import functional

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.cli import main
from hywia_kernels.deploy import planning
from hywia_kernels.method import judging, reconstruction
from hywia_kernels.method.judging import Judge, Texts, shared_out
from hywia_kernels.method.search import EFFORTS, Choices, _best_split, best_plan
from hywia_kernels.types import Scores
from tests.support.tiny import TINY, fresh, make_plan


@pytest.fixture
def text():
    return torch.randint(0, 256, (24, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def scores(gqa, text):
    return hk.fuse(hk.calibrate(gqa, text[:6]))


def values(model):
    return {n: v.clone() for n, v in model.state_dict().items()}


def assert_as_it_was(model, before):
    now = values(model)
    assert now.keys() == before.keys()
    assert [n for n in before if not torch.equal(now[n], before[n])] == []


def divergence(dense, changed, tokens):
    with torch.no_grad():
        want, got = (functional.log_softmax(m(tokens).logits.double(), -1) for m in (dense, changed))
    return float(functional.kl_div(got, want, log_target=True, reduction="none").sum(-1).mean())


def with_prices(scores, **prices):
    """Scores whose units all cost what their kind does."""
    loss = {g.name: torch.full((g.units,), prices[g.kind]) for g in scores.groups}
    return Scores(scores.groups, scores.values, loss, scores.parameters, scores.fingerprint, dict(scores.record))


REQUEST = {"ratio": 0.3, "align": 4, "target": "auto"}


def test_there_is_a_split_for_every_count_of_heads_and_each_meets_the_ratio(model):
    scores = hk.score(model, criterion="random", seed=1)
    step = 4 * sum(g.unit_parameters for g in scores.groups if g.kind == "mlp") / scores.parameters
    heads = scores.groups[0].units
    for layout in ("uniform", "adaptive"):
        given = scores if layout == "uniform" else with_prices(scores, mlp=1.0, attention=1.0)
        choices = planning.choices(given, layout=layout, **REQUEST)
        counts = [split["attention"] for split in choices.splits]
        assert len(set(counts)) == len(counts) > 1
        assert max(counts) == heads
        for split in choices.splits:
            for spread in choices.spreads:
                plan = choices.plan(split, spread)
                assert abs(plan.ratio - 0.3) <= step
                assert set(plan.widths("attention")) == {split["attention"]}
        first = planning.plan_for(given, layout=layout, **REQUEST)
        again = choices.plan(choices.splits[0], choices.spreads[-1])
        assert {n: k.tolist() for n, k in again.keep.items()} == {n: k.tolist() for n, k in first.keep.items()}
    with pytest.raises(UsageError, match=r"split: expected one of .*, got \{'mlp': 3, 'attention': 3\}"):
        choices.plan({"mlp": 3, "attention": 3}, 1.0)


def test_servers_rules_and_wanted_widths_hold_for_every_split(text):
    model = fresh(TINY[0])
    scores = hk.fuse(hk.calibrate(model, text[:4]))
    choices = planning.choices(scores, **REQUEST, serve=("vllm.heads",), tensor_parallel=2)
    assert [split["attention"] % 2 for split in choices.splits] == [0] * len(choices.splits)
    assert len(choices.splits) > 1
    for split in choices.splits:
        assert choices.plan(split, 1.0).record["constraints"] == ["vllm.heads: query heads are a multiple of 2"]


def test_spread_goes_from_equal_shares_to_the_estimates_own(gqa, scores):
    request = {"ratio": 0.25, "units": ("mlp",), "align": 4, "layout": "adaptive"}
    widths = {spread: hk.plan(scores, spread=spread, **request).widths("mlp") for spread in (0.0, 0.25, 0.5, 0.75, 1.0)}
    equal = hk.plan(scores, **{**request, "layout": "uniform"}).widths("mlp")
    assert widths[0.0] == equal
    assert widths[1.0] == hk.plan(scores, **request).widths("mlp") != equal
    assert {sum(w) for w in widths.values()} == {sum(equal)}
    ranges = [max(w) - min(w) for w in widths.values()]
    assert ranges == sorted(ranges)
    with pytest.raises(UsageError, match="spread: expected a number from 0 to 1, got 1.5"):
        hk.plan(scores, spread=1.5, **request)


def test_spread_is_a_mean_of_prices(scores):
    """Of two layers whose channels cost 1 and 16 a step, the dear one is cut where its mixed price is the lower one."""
    groups = [g for g in scores.groups if g.kind == "mlp"]
    rising = torch.arange(1.0, 57.0)
    loss = {g.name: torch.ones(g.units) for g in scores.groups}
    for group, price in zip(groups, (1.0, 16.0, 16.0), strict=True):
        loss[group.name] = price * rising
    ranked = {g.name: loss[g.name] for g in scores.groups}
    priced = Scores(scores.groups, ranked, loss, scores.parameters, scores.fingerprint)
    request = {"group_ratio": 0.5, "units": ("mlp",), "align": 1, "layout": "adaptive"}
    for spread in (0.5, 1.0):
        kept = hk.plan(priced, spread=spread, **request).widths("mlp")
        # All layers' last steps cost the same: their share that goes, times what a layer's steps cost at that share.
        factors = [p**spread * 11.0 ** (1 - spread) for p in (1.0, 16.0, 16.0)]  # 11: the mean of the three
        steepness = 1.0  # the price of a step is linear in how many went before
        gone = [56 - k for k in kept]
        assert sum(gone) == 84
        inner = [(g, f) for g, f in zip(gone, factors, strict=True) if 0 < g < 55]
        last = [f * g**steepness for g, f in inner]
        assert max(last) / min(last) < 1.2, (kept, last)


@pytest.mark.parametrize("ridge", [None, 4.0])
@pytest.mark.parametrize("cut", ["both", "adaptive"])
def test_a_plan_is_judged_as_a_changed_copy_would_be(model, text, cut, ridge):
    plan = make_plan(model, cut)
    before, state = values(model), model_state(model)
    got = Judge(model, Texts(text[:12], text[16:], 8), ridge).divergence(plan)
    assert_as_it_was(model, before)
    assert_same(state, model_state(model))
    other = copy.deepcopy(model)
    if ridge is None:
        hk.mask(other, plan)
    else:
        hk.reconstruct(other, plan, text[:12], ridge=ridge)
    assert got == pytest.approx(divergence(model, other, text[16:]), rel=1e-4)
    assert got > 1e-3


def test_logits_in_parts_give_the_same_divergence(gqa, text, monkeypatch):
    plan = make_plan(gqa, "both")
    whole = Judge(gqa, Texts(text[:4], text[4:], 8), None).divergence(plan)
    monkeypatch.setattr("hywia_kernels.engine.loss.LOGIT_BYTES", 3 * 4 * 259)
    monkeypatch.setattr("hywia_kernels.method.judging.CHUNK_TOKENS", 40)
    assert Judge(gqa, Texts(text[:4], text[4:], 8), None).divergence(plan) == pytest.approx(whole, rel=1e-5)


def test_a_divergence_that_is_no_number_is_refused(gqa, text):
    judge = Judge(gqa, Texts(text[:4], text[4:], 8), None)
    judge.dense[0] = float("nan")
    with pytest.raises(HywiaError, match="the divergence of its predictions is NaN or Inf"):
        judge.divergence(make_plan(gqa, "both"))


STEPS = [(reconstruction, s, a) for s in ("equations_of", "_apply", "zero_units") for a in (1, 4)]
STEPS += [(judging, "leaving", 1), (judging, "mean_divergence", 1)]


@pytest.mark.parametrize(("module", "step", "at"), STEPS)
def test_a_judgement_that_fails(gqa, text, module, step, at, monkeypatch):
    plan, judge = make_plan(gqa, "both"), Judge(gqa, Texts(text[:12], text[16:], 8))
    before, state = values(gqa), model_state(gqa)
    original, calls = getattr(module, step), []

    def planted(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise HywiaError("planted")
        return original(*arguments)

    monkeypatch.setattr(module, step, planted)
    with pytest.raises(HywiaError, match="planted"):
        judge.divergence(plan)
    assert len(calls) == at
    assert_as_it_was(gqa, before)
    assert_same(state, model_state(gqa))


def test_an_interrupted_judgement(text):
    """At any line the model is as it was, also where what follows was training it."""
    model = fresh(TINY[2])
    plan, judge = make_plan(model, "both"), Judge(model, Texts(text[:6], text[16:], 8))
    before, state = values(model), model_state(model)

    def follow(masked, _):
        masked(text[:2], labels=text[:2]).loss.backward()
        with torch.no_grad():
            for parameter in masked.parameters():
                parameter -= 0.1 * parameter.grad

    for work in (lambda: judge.divergence(plan), lambda: judge.after(plan, follow)):
        with Interrupt() as whole:
            work()
        assert_as_it_was(model, before)
        for at in range(1, whole.lines, max(1, whole.lines // 25)):
            with Interrupt(at):
                work()
            assert_as_it_was(model, before)
            assert_same(state, model_state(model))


@pytest.mark.parametrize("ridge", [None, 4.0])
def test_what_follows_is_judged_and_taken_back(gqa, text, ridge):
    plan, judge = make_plan(gqa, "both"), Judge(gqa, Texts(text[:12], text[16:], 8), ridge)
    before, state, seen = values(gqa), model_state(gqa), []

    def follow(model, given):
        assert given is plan
        seen.append(divergence(dense, model, text[16:]))
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(20):
            optimiser.zero_grad()
            with torch.no_grad():
                want = functional.log_softmax(dense(text[:16]).logits, -1)
            got = functional.log_softmax(model(text[:16]).logits, -1)
            functional.kl_div(got, want, log_target=True, reduction="batchmean").backward()
            optimiser.step()
        model.train()
        seen.append(divergence(dense, model, text[16:]))

    dense = copy.deepcopy(gqa)
    first = judge.divergence(plan)
    got = judge.after(plan, follow)
    assert seen[0] == pytest.approx(first, rel=1e-4)
    assert got == pytest.approx(seen[1], rel=1e-4)
    assert got < first
    assert_as_it_was(gqa, before)
    assert_same(state, model_state(gqa))


@pytest.mark.parametrize(("useless", "kept"), [("mlp", 3), ("attention", 1)])
def test_the_estimates_choice_is_wrong_and_the_search_finds_the_right_one(gqa, text, useless, kept):
    """One kind adds next to nothing to the hidden states, while the estimates say that it costs all the loss."""
    with torch.no_grad():
        for layer in gqa.model.layers:
            (layer.mlp.down_proj if useless == "mlp" else layer.self_attn.o_proj).weight.mul_(1e-3)
    prices = {"mlp": 1.0, "attention": 1e-6} if useless == "mlp" else {"mlp": 1e-6, "attention": 1.0}
    scores = with_prices(hk.fuse(hk.calibrate(gqa, text[:6])), **prices)
    request = {"ratio": 0.3, "align": 4}
    assert hk.plan_for(scores, **request).widths("attention")[0] == 4 - kept, "as the estimates say"
    choices = planning.choices(scores, **request)
    plan = best_plan(gqa, scores, choices, text, effort="fast", scored=6, ridge=4.0)
    assert plan.widths("attention") == [kept] * 3
    done = plan.record["search"]
    assert [trial["widths"]["attention"] for trial in done["candidates"]] == [1, 2, 3]
    chosen = [trial for trial in done["candidates"] if trial["chosen"]]
    assert [trial["divergence"] for trial in chosen] == [done["divergence"]]
    assert done["divergence"] == min(trial["divergence"] for trial in done["candidates"])
    assert done["divergence"] < 0.25 * max(trial["divergence"] for trial in done["candidates"])
    estimates = [trial["estimate"] for trial in done["candidates"]]
    assert estimates.index(min(estimates)) != [t["chosen"] for t in done["candidates"]].index(True)


def test_what_follows_can_turn_the_choice(gqa, scores, text):
    """Of the two best plans, the one that ends ahead after what follows."""
    choices = planning.choices(scores, ratio=0.3, align=4)
    before = values(gqa)
    plain = best_plan(gqa, scores, choices, text, effort="fast", scored=6, ridge=4.0)
    ranked = sorted(plain.record["search"]["candidates"], key=lambda t: t["divergence"])
    best, second = (t["widths"]["attention"] for t in ranked[:2])

    def spoils(model, plan):
        if plan.widths("attention")[0] == best:
            with torch.no_grad():
                model.model.norm.weight.mul_(-1.0)

    turned = best_plan(gqa, scores, choices, text, effort="fast", scored=6, ridge=4.0, follow=spoils)
    assert plain.widths("attention")[0] == best
    assert turned.widths("attention")[0] == second
    followed = [t for t in turned.record["search"]["candidates"] if "followed" in t]
    assert len(followed) == 2
    assert turned.record["search"]["divergence"] == min(t["followed"] for t in followed)
    assert_as_it_was(gqa, before)


def without_seconds(plan):
    done = json.loads(json.dumps(dict(plan.record["search"]), default=dict))
    del done["seconds"]
    for trial in done["candidates"]:
        del trial["seconds"]
    return done, {name: keep.tolist() for name, keep in plan.keep.items()}


def test_a_search_repeats(gqa, scores, text):
    choices = planning.choices(scores, ratio=0.3, align=4, layout="adaptive")
    made = [best_plan(gqa, scores, choices, text, effort="fast", scored=6, ridge=4.0) for _ in range(2)]
    assert without_seconds(made[0]) == without_seconds(made[1])
    done = made[0].record["search"]
    assert len(done["candidates"]) == EFFORTS["fast"].trials(choices) == 3 + 2
    assert {t["spread"] for t in done["candidates"]} == {0.0, 0.5, 1.0}


def test_where_there_is_nothing_to_choose_nothing_is_tried(gqa, scores, text, monkeypatch):
    monkeypatch.setattr("hywia_kernels.method.search.Judge", lambda *a: pytest.fail("tried"))
    choices = planning.choices(scores, ratio=0.3, align=4, units=("mlp",))
    assert EFFORTS["fast"].trials(choices) == 0
    plan = best_plan(gqa, scores, choices, text, effort="fast", scored=6, ridge=4.0)
    assert plan.widths("mlp") == hk.plan_for(scores, ratio=0.3, align=4, units=("mlp",)).widths("mlp")
    assert "search" not in plan.record


@pytest.mark.parametrize("most", [6, 16])
@pytest.mark.parametrize("count", [1, 3, 6, 7, 12, 32, 71])
def test_few_of_many_splits_are_tried(count, most):
    splits = [{"attention": i + 1, "mlp": 64 * (2 * count - i)} for i in range(count)]
    for best in range(0, count, max(1, count // 9)):
        tried = []

        def judge(place, best=best, tried=tried):
            tried.append(place)
            return abs(place - best) ** 0.7  # with one valley

        own = (best + count // 2) % count
        found = _best_split(judge, splits, own, most)
        assert own in tried
        assert len(set(tried)) == len(tried) <= most
        if count <= most:
            assert found == best
            assert sorted(tried) == list(range(count))
        elif count // 8 <= best:  # further down it is not looked for
            assert abs(found - best) <= max(1, count // 16), (best, found, tried)


def test_the_most_that_is_tried():
    def made(splits, spreads):
        return Choices([{"attention": i} for i in range(splits)], (1.0,) * spreads, lambda split, spread: None)

    assert [EFFORTS["fast"].trials(made(n, 1)) for n in (1, 3, 32)] == [0, 3, 6]
    assert [EFFORTS["fast"].trials(made(n, 3)) for n in (1, 3, 32)] == [3, 5, 8]
    assert [EFFORTS["thorough"].trials(made(n, 3)) for n in (8, 32)] == [10, 18]


def test_what_a_plan_is_refitted_on_goes_by_device_and_size(gqa, monkeypatch):
    def on(device):
        return [EFFORTS[effort].refit_samples(gqa, device) for effort in ("fast", "thorough")]

    assert on("cpu") == [32, 128]
    assert on("cuda") == [256, 512]
    monkeypatch.setattr("hywia_kernels.settings._LARGE_PARAMETERS", 1)
    assert on("cuda") == [32, 128]
    assert on("cpu") == [32, 128]


@pytest.mark.parametrize(
    ("length", "scored", "refit", "judged", "want"),
    [
        (160, 96, 32, 32, (32, 32, 32)),
        (128, 96, 32, 32, (32, 32, 32)),
        (110, 96, 32, 32, (32, 32, 14)),
        (40, 40, 32, 32, (20, 20, 0)),
        (40, 4, 32, 32, (20, 20, 20)),
        (3, 2, 32, 32, (2, 1, 1)),
        (1, 1, 32, 32, (1, 1, 0)),
    ],
)
def test_text_is_shared_out(length, scored, refit, judged, want):
    tokens = torch.arange(length)[:, None].expand(length, 5)
    got = shared_out(tokens, scored, refit, judged)
    assert (len(got.refit), len(got.judged), got.fresh) == want
    assert got.refit[0, 0] == 0
    assert got.judged[-1, 0] == length - 1
    if length > 1:
        assert got.refit[-1, 0] < got.judged[0, 0]


def recipe(**changes):
    settings = {"ratio": 0.3, "align": 4, "samples": 6, "seq_len": 11, "reconstruct_samples": 10}
    return hk.Recipe(**{**settings, **changes})


def test_compress_takes_the_best_plan_and_records_all(text):
    model = fresh(TINY[2])
    by_estimate = hk.compress(copy.deepcopy(model), None, recipe(search="none"), tokens=text)
    result = hk.compress(copy.deepcopy(model), None, recipe(), tokens=text)
    assert (by_estimate.recipe.search, result.recipe.search) == ("none", "fast")
    assert "search" not in by_estimate.plan.record
    assert "search" not in by_estimate.record["seconds"]
    assert result.record["seconds"]["search"] > 0
    done = result.plan.record["search"]
    assert (done["effort"], done["refitted"], done["judged"], done["fresh"]) == ("fast", 12, 12, 12)
    best = min(done["candidates"], key=lambda t: t["divergence"])
    assert best["chosen"]
    assert result.plan.widths("attention") == [best["widths"]["attention"]] * 3
    assert all(abs(t["removed"] - 0.3) < 0.03 for t in done["candidates"])
    own = min(done["candidates"], key=lambda t: t["estimate"])
    assert by_estimate.plan.widths("attention") == [own["widths"]["attention"]] * 3
    assert json.loads(json.dumps(dict(result.plan.record["search"]), default=dict))["tried"] == 3


def test_without_a_reconstruction_plans_are_judged_masked(text):
    result = hk.compress(fresh(TINY[2]), None, recipe(reconstruct=False, reconstruct_samples=None), tokens=text)
    assert result.plan.record["search"]["refitted"] is None
    masked = fresh(TINY[2])
    hk.mask(masked, dataclasses.replace(result.plan, record={}))
    want = divergence(fresh(TINY[2]), masked, text[12:])
    assert result.plan.record["search"]["divergence"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"ratio": 0.3}, "fast"),
        ({"ratio": 0.3, "search": "thorough"}, "thorough"),
        ({"ratio": 0.3, "search": "none"}, "none"),
        ({"ratio": 0.3, "units": ("mlp",)}, "none"),
        ({"ratio": 0.3, "units": ("mlp",), "layout": "adaptive"}, "fast"),
        ({"ratio": 0.3, "criterion": "random"}, "none"),
        ({"group_ratio": 0.3}, "none"),
        ({"group_ratio": 0.3, "search": "fast"}, "fast"),
        ({}, "none"),
    ],
)
def test_when_a_recipe_searches(settings, want):
    assert hk.Recipe(**settings).resolved().search == want


def test_the_text_has_room_for_what_is_judged():
    fast = hk.Recipe(ratio=0.3, samples=200, reconstruct_samples=8).resolved()
    assert fast.text_samples() == 232
    assert hk.Recipe(ratio=0.3, samples=200, reconstruct_samples=8, search="none").resolved().text_samples() == 200
    assert hk.Recipe(samples=200, reconstruct_samples=8).resolved().text_samples() == 232, "for a later search"
    assert hk.Recipe(ratio=0.3).resolved().text_samples() == 128, "no more than the reconstruction reads anyway"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ratio": 0.3, "search": "fats"},
            "search: expected one of none, fast, thorough, got 'fats'; did you mean 'fast'",
        ),
        ({"ratio": 0.3, "search": "fast", "criterion": "random"}, "search: fast goes with criterion 'hywia'"),
    ],
)
def test_recipes_that_cannot_be(settings, message):
    with pytest.raises(UsageError, match=message):
        hk.Recipe(**settings).check()


def test_a_search_that_has_no_effect_is_said():
    def unused(**settings):
        return set(hk.Recipe(**settings).unused(["search"]))

    assert unused(ratio=0.3, search="fast") == set()
    assert unused(ratio=0.3, search="fast", units=("mlp",)) == {"search"}
    assert unused(ratio=0.3, search="none", units=("mlp",)) == set()
    assert unused(group_ratio=0.3, search="fast", layout="uniform") == {"search"}
    assert unused(group_ratio=0.3, search="fast") == set()


def test_a_record_of_before_there_was_a_search_repeats_without_one(tmp_path):
    values = hk.Recipe(ratio=0.3).to_dict()
    del values["search"]
    (tmp_path / "hywia.json").write_text(json.dumps({"versions": {}, "recipe": values}))
    assert hk.Recipe.read(tmp_path / "hywia.json").search == "none"
    (tmp_path / "own.json").write_text(json.dumps(values))
    assert hk.Recipe.read(tmp_path / "own.json").search is None


def test_layers_budgets_of_the_papers_protocol(text):
    model = fresh(TINY[2])
    result = hk.compress(model, None, recipe(ratio=None, group_ratio=0.4, search="fast"), tokens=text)
    done = result.plan.record["search"]
    assert [t["spread"] for t in done["candidates"]] == [0.0, 0.5, 1.0]
    assert len({t["removed"] for t in done["candidates"]}) == 1
    best = min(done["candidates"], key=lambda t: t["divergence"])
    assert best["chosen"]


def test_scores_without_text_are_planned_by_the_estimate(text):
    model = fresh(TINY[2])
    scored = hk.Measured(hk.fuse(hk.calibrate(model, text[:4])))
    plain = recipe(reconstruct=False, reconstruct_samples=None)
    result = hk.compress(copy.deepcopy(model), None, plain, measured=scored)
    assert result.recipe.search == "none"
    with pytest.raises(HywiaError, match="text: the search needs 1 samples, 0 are at hand"):
        hk.compress(model, None, dataclasses.replace(plain, search="fast"), measured=scored)


TEXT = "the quick brown fox jumps over the lazy dog. " * 90
SMALL = ["--calib", "text.txt", "--samples", "6", "--seq-len", "16", "--align", "4", "--no-eval"]


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def record(folder):
    return json.loads((folder / "hywia.json").read_text())


def test_the_command_prints_the_plans_and_marks_the_one_that_is_taken(here, capsys):
    assert main(["prune", "model", "-o", "out", "--ratio", "30%", *SMALL]) == 0
    out = capsys.readouterr().out
    done = record(here / "out")["plan"]["search"]
    assert f"tried 3 plans, refitted on 32 samples and judged on 32, in {done['seconds']:.1f} s" in out
    lines = out[out.index("tried 3 plans") :].splitlines()[1:5]
    assert lines[0].split() == ["attention", "mlp", "estimate", "divergence"]
    shown = [line.split() for line in lines[1:]]
    assert [int(line[0]) for line in shown] == [t["widths"]["attention"] for t in done["candidates"]] == [1, 2, 3]
    for line, trial in zip(shown, done["candidates"], strict=True):
        assert int(line[1]) == trial["widths"]["mlp"]
        assert float(line[3]) == pytest.approx(trial["divergence"], abs=1e-4)
        assert (line[-1] == "taken") == trial["chosen"]
    kept = record(here / "out")["plan"]["widths"]
    chosen = next(t for t in done["candidates"] if t["chosen"])
    assert kept["attention"] == [chosen["widths"]["attention"]] * 3
    card = (here / "out" / "README.md").read_text()
    assert "| plans that were tried | 3 |" in card
    assert f"{done['divergence']:.6g}" in card


def test_scored_before_is_searched_as_scored_now(here, capsys):
    """`hywia score` keeps what a search judges on."""
    assert main(["score", "model", "-o", "scores", *SMALL[:6]]) == 0
    assert main(["prune", "model", "-o", "now", "--ratio", "30%", *SMALL]) == 0
    stored = ["prune", "model", "-o", "stored", "--ratio", "30%", "--scores", "scores", *SMALL[6:]]
    assert main(stored) == 0
    one, two = record(here / "now"), record(here / "stored")
    assert one["kept_units"] == two["kept_units"]
    trials = [
        [{k: v for k, v in t.items() if k != "seconds"} for t in r["plan"]["search"]["candidates"]] for r in (one, two)
    ]
    assert trials[0] == trials[1]
    assert (here / "now" / "model.safetensors").read_bytes() == (here / "stored" / "model.safetensors").read_bytes()


def test_too_little_text_is_said(here, capsys):
    (here / "text.txt").write_text(TEXT[: 16 * 12])
    assert main(["prune", "model", "-o", "out", "--ratio", "30%", *SMALL]) == 0
    done = record(here / "out")["plan"]["search"]
    assert (done["judged"], done["fresh"]) == (6, 6)
    assert "of which" not in capsys.readouterr().out
    (here / "text.txt").write_text(TEXT[: 16 * 8])
    assert main(["prune", "model", "-o", "less", "--ratio", "30%", *SMALL]) == 0
    assert "judged on 4, 2 of which were scored too, in" in capsys.readouterr().out


def test_no_search_by_the_command_line(here, capsys):
    assert main(["prune", "model", "-o", "out", "--ratio", "30%", "--search", "none", *SMALL]) == 0
    assert "tried" not in capsys.readouterr().out
    kept = record(here / "out")
    assert kept["recipe"]["search"] == "none"
    assert "search" not in kept["plan"]
    assert main(["prune", "model", "-o", "no", "--ratio", "0.3", "--units", "mlp", "--search", "fast", *SMALL]) == 2
    assert "search: goes with --layout adaptive, or with --ratio and several kinds" in capsys.readouterr().err
