"""Recovery: a cut model comes nearer to the dense one, and never ends farther from it than it was."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import hywia_kernels as hk
from hywia_kernels import arch
from hywia_kernels.cli import main
from hywia_kernels.errors import HywiaError, UsageError
from hywia_kernels.method.recovery import distilled, job, teacher, training
from hywia_kernels.method.recovery.work import beside
from tests.support.families import FAMILIES
from tests.support.tiny import TINY, fresh, make_plan

ROOT = Path(__file__).parents[2]
RATES = {"full": 2e-3, "lora": 5e-3, "scales": 2e-2}
IDS = torch.randint(0, 256, (60, 16), generator=torch.Generator().manual_seed(3))


def small(tune="full", **more):
    return hk.Recovery(**{"tune": tune, "tokens": 20 * 8 * 16, "batch": 8, "checks": 4, "rate": RATES[tune], **more})


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    """As on a CPU without a matrix unit, so that a loss can be held against its formula."""
    monkeypatch.setattr("hywia_kernels.method.recovery.job.multiplies_bfloat16", lambda device: False)


@pytest.fixture
def pair():
    dense = fresh(TINY[2])
    cut = copy.deepcopy(dense)
    hk.prune(cut, make_plan(cut, "both"))
    return dense, cut


@torch.no_grad()
def kl(dense, cut, ids):
    """Mean over all positions but the last, in float64."""
    p, q = (functional.log_softmax(m(ids).logits[:, :-1].double(), -1) for m in (dense, cut))
    return float((p.exp() * (p - q)).sum(-1).mean())


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_products_in_bfloat16_recover_as_much(monkeypatch, pair):
    dense, cut = pair
    want = hk.recover(copy.deepcopy(cut), dense, None, small(), tokens=IDS)
    monkeypatch.setattr("hywia_kernels.method.recovery.job.multiplies_bfloat16", lambda device: True)
    got = hk.recover(cut, dense, None, small(), tokens=IDS)
    assert {p.dtype for p in cut.parameters()} == {torch.float32}
    assert got.after != want.after
    assert got.after == pytest.approx(want.after, rel=0.03)
    assert got.after < 0.9 * got.before


@pytest.mark.parametrize("hold", ["live", "8bit", "kept"])
@pytest.mark.parametrize("tune", ["full", "lora", "scales"])
def test_the_cut_model_comes_nearer(pair, tune, hold):
    dense, cut = pair
    before, names = state(dense), [(n, type(m)) for n, m in cut.named_modules()]
    held_out, at_first = IDS[-12:], kl(dense, cut, IDS[-12:])
    done = hk.recover(cut, dense, None, small(tune, hold=hold), tokens=IDS)
    assert done.kept
    assert done.after < 0.9 * done.before
    assert kl(dense, cut, held_out) < 0.9 * at_first
    if hold == "live":  # what it reports is what is measured from outside, on the samples that it kept apart
        assert done.before == pytest.approx(at_first, rel=1e-4)
        assert done.after == pytest.approx(kl(dense, cut, held_out), rel=1e-4)
    assert same(before, state(dense))
    assert [(n, type(m)) for n, m in cut.named_modules()] == names
    assert all(p.requires_grad and p.grad is None for p in cut.parameters())
    assert done.record["text_read"]["samples"] == 48
    assert 0 <= done.record["text_seconds"] < done.record["seconds"]
    assert done.record["steps"] == 20


def test_the_same_call_gives_the_same_weights(pair):
    dense, cut = pair
    other = copy.deepcopy(cut)
    for model in (cut, other):
        hk.recover(model, dense, None, small(), tokens=IDS)
    assert same(state(cut), state(other))


def asked(model):
    """Counts how many samples the model's decoder reads from here on."""
    read = []
    arch.decoder(model).register_forward_pre_hook(lambda module, arguments: read.append(len(arguments[0])))
    return read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_that_is_read_often_is_asked_about_once(pair, monkeypatch, dtype):
    """The same weights to the bit, for one reading of the text by the dense model."""
    dense, cut = (model.to(dtype) for model in pair)
    often, read = copy.deepcopy(cut), asked(dense)
    done = hk.recover(cut, dense, None, small(), tokens=IDS)
    assert done.record["remembered"] is True
    assert sum(read) == 60
    monkeypatch.setattr(job, "_READ_OFTEN", math.inf)
    assert hk.recover(often, dense, None, small(), tokens=IDS).record["remembered"] is False
    assert sum(read) - 60 > 160
    assert same(state(cut), state(often))


def test_a_text_that_is_read_once_is_not_asked_about_before(pair):
    dense, cut = pair
    done = hk.recover(cut, dense, None, small(tokens=48 * 16), tokens=IDS)
    assert done.record["steps"] == 6
    assert done.record["remembered"] is False


def test_what_no_memory_has_room_for_is_not_remembered(pair, monkeypatch):
    dense, cut = pair
    monkeypatch.setattr(teacher, "free_bytes", lambda device: 4 * 60 * 15 * 64)
    assert hk.recover(cut, dense, None, small(), tokens=IDS).record["remembered"] is False


@pytest.mark.parametrize("tune", ["full", "lora", "scales"])
def test_bfloat16_stays_bfloat16(pair, tune):
    dense, cut = pair
    cut, dense = cut.bfloat16(), dense.bfloat16()
    done = hk.recover(cut, dense, None, small(tune), tokens=IDS)
    assert done.after < done.before
    assert {p.dtype for p in cut.parameters()} == {torch.bfloat16}


def test_a_rate_a_hundred_times_too_high_leaves_the_model_as_it_was(pair):
    dense, cut = pair
    before = state(cut)
    done = hk.recover(cut, dense, None, small(rate=5.0), tokens=IDS)
    assert not done.kept
    assert done.record["stopped"]
    assert done.after == done.before
    assert same(before, state(cut))


def test_nan_is_caught_and_the_model_is_as_it_was(pair, monkeypatch):
    dense, cut = pair
    before, calls = state(cut), []
    loss = distilled.distillation_loss

    def poisoned(*args, **kwargs):
        calls.append(1)
        value = loss(*args, **kwargs)
        return value * math.nan if len(calls) == 4 else value

    monkeypatch.setattr(distilled, "distillation_loss", poisoned)
    done = hk.recover(cut, dense, None, small(), tokens=IDS)
    assert "nan" in done.record["stopped"]
    assert not done.kept
    assert same(before, state(cut))


def test_worse_steps_at_the_end_are_not_kept(pair, monkeypatch):
    """The lowest held-out divergence decides, not the last one."""
    dense, cut = pair
    kept, divergence = [], training.divergence

    def worse_later(both, *args):
        value = divergence(both, *args)
        kept.append(state(both.student))
        return value if len(kept) < 3 else value * 1.2

    monkeypatch.setattr(training, "divergence", worse_later)
    done = hk.recover(cut, dense, None, small(patience=9), tokens=IDS)
    best = min(range(len(done.record["divergences"])), key=lambda i: done.record["divergences"][i][1])
    assert 0 < best < len(kept)
    assert same(kept[best - 1], state(cut))


def test_an_interrupt_leaves_the_model_as_it_was_and_the_same_call_goes_on(pair, tmp_path, monkeypatch):
    dense, cut = pair
    whole = copy.deepcopy(cut)
    hk.recover(whole, dense, None, small(), tokens=IDS)
    before, steps, loss = state(cut), [], distilled.distillation_loss

    def stopping(*args, **kwargs):
        if torch.is_grad_enabled():
            steps.append(1)
            if len(steps) == 13:
                raise KeyboardInterrupt
        return loss(*args, **kwargs)

    monkeypatch.setattr(distilled, "distillation_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        hk.recover(cut, dense, None, small(), tokens=IDS, work=tmp_path / "work")
    assert same(before, state(cut))
    done = hk.recover(cut, dense, None, small(), tokens=IDS, work=tmp_path / "work")
    assert len(steps) == 13 + 10  # twelve steps were done, the last checkpoint is of the tenth
    assert done.record["resumed"]
    assert not (tmp_path / "work").exists()
    assert [s for s, _ in done.record["divergences"]] == [0, 5, 10, 15, 20]
    for name, value in state(cut).items():
        torch.testing.assert_close(value, state(whole)[name], rtol=0, atol=0)


def test_another_request_does_not_go_on(pair, tmp_path, monkeypatch):
    dense, cut = pair
    loss, steps = distilled.distillation_loss, []

    def stopping(*args, **kwargs):
        steps.append(torch.is_grad_enabled())
        if sum(steps) == 8:
            steps.clear()
            raise KeyboardInterrupt
        return loss(*args, **kwargs)

    monkeypatch.setattr(distilled, "distillation_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        hk.recover(cut, dense, None, small(), tokens=IDS, work=tmp_path / "work")
    monkeypatch.setattr(distilled, "distillation_loss", loss)
    done = hk.recover(cut, dense, None, small(rate=1e-3), tokens=IDS, work=tmp_path / "work")
    assert not done.record["resumed"]


@pytest.mark.parametrize("tune", ["full", "lora", "scales"])
def test_an_error_before_the_first_step_leaves_modules_and_dtypes(pair, tune, monkeypatch):
    dense, cut = pair
    cut = cut.bfloat16()
    before, names = state(cut), [(n, type(m)) for n, m in cut.named_modules()]
    monkeypatch.setattr(training, "distiller", lambda: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        hk.recover(cut, dense, None, small(tune), tokens=IDS)
    assert same(before, state(cut))
    assert [(n, type(m)) for n, m in cut.named_modules()] == names
    assert not any(m._forward_pre_hooks for m in cut.modules())


def test_generators_are_the_callers_again(pair):
    dense, cut = pair
    before = torch.get_rng_state(), random.getstate()
    hk.recover(cut, dense, None, small(tokens=128), tokens=IDS)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


RANKS = """
import copy, sys, torch
import torch.distributed as dist
import hywia_kernels as hk
from hywia_kernels.method.recovery import job
from tests.pipeline.test_recovery import IDS, RATES, small, state
from tests.support.tiny import TINY, fresh, make_plan
job.multiplies_bfloat16 = lambda device: False  # as the test that runs this
dist.init_process_group("gloo")
dense = fresh(TINY[2])
cut = copy.deepcopy(dense)
hk.prune(cut, make_plan(cut, "both"))
done = hk.recover(cut, dense, None, small(), tokens=IDS)
found = {"state": state(cut), "steps": done.record["steps"], "after": done.after}
torch.save(found, f"{sys.argv[1]}/{dist.get_rank()}.pt")
"""


def test_two_ranks_train_as_one(pair, tmp_path):
    """The same samples a step, and so the same weights up to the order of sums."""
    dense, cut = pair
    (tmp_path / "ranks.py").write_text(RANKS)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "ranks.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, *words, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    alone = hk.recover(cut, dense, None, small(), tokens=IDS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["steps"] == second["steps"] == 20
    assert same(first["state"], second["state"])
    assert first["after"] == pytest.approx(alone.after, rel=2e-3)
    for name, value in state(cut).items():
        torch.testing.assert_close(first["state"][name], value, rtol=0, atol=2e-3)


def test_the_loss_mixes_in_the_texts_own_tokens(pair):
    """With hard = 1 the dense model has no say: the cut model learns the text."""
    dense, cut = pair
    text = torch.arange(16).repeat(60, 1)
    loss = functional.cross_entropy(cut(text[:1]).logits[0, :-1], text[0, 1:]).item()
    done = hk.recover(cut, dense, None, small(hard=1.0, rate=5e-3, tokens=40 * 8 * 16), tokens=text)
    if done.kept:
        assert functional.cross_entropy(cut(text[:1]).logits[0, :-1], text[0, 1:]).item() < loss
    assert done.record["hard"] == 1.0


@pytest.mark.parametrize("name", ["bloom", "gpt2", "gemma2", "phi3", "olmo2"])
def test_scales_fold_in_every_kind_of_layer(name):
    """Folded scales give what the scales gave: the divergence that training saw is the model's own."""
    family = next(f for f in FAMILIES if f.name == name)
    dense = family.build()
    cut = copy.deepcopy(dense)
    ids = IDS % dense.config.get_text_config().vocab_size
    scores = hk.score(cut, ids[:4])
    hk.prune(cut, hk.plan(scores, group_ratio=0.3, align=4, units=("mlp",)))
    done = hk.recover(cut, dense, None, small("scales", rate=5e-3), tokens=ids)
    assert done.after < done.before
    assert done.after == pytest.approx(kl(dense, cut, ids[-12:]), rel=1e-4)


def test_a_teacher_of_another_vocabulary_is_refused(pair):
    _, cut = pair
    other = fresh(TINY[2])
    other.resize_token_embeddings(300)
    with pytest.raises(HywiaError, match="vocabulary of 259 tokens, got one of 300"):
        hk.recover(cut, other, None, small(), tokens=IDS)
    with pytest.raises(UsageError, match="the cut model itself"):
        hk.recover(cut, cut, None, small(), tokens=IDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tune": "most"}, "tune: expected one of scales, lora, full"),
        ({"hold": "warm"}, "hold: expected one of live, 8bit, kept"),
        ({"hard": 1.5}, "hard: expected a share from 0 to 1"),
        ({"rate": 0.0}, "rate: expected a positive number"),
        ({"text": ()}, "text: expected names of sources"),
        ({"text": ("self", "self")}, "expected each source once"),
        ({"text": ("self", "a.txt"), "shares": (1.0,)}, "a positive number for each of 2 sources"),
        ({"tokens": 0}, "tokens: expected a whole number of at least 1"),
    ],
)
def test_requests_are_checked(change, message):
    with pytest.raises(UsageError, match=message):
        hk.Recovery(**change).check()


def test_a_recipe_holds_its_recovery_in_json_too(tmp_path):
    recipe = hk.Recipe(ratio=0.5, recover=["self", "a.jsonl"])
    assert recipe.recover == hk.Recovery(text=("self", "a.jsonl"))
    recipe.write(tmp_path / "recipe.json")
    assert hk.Recipe.read(tmp_path / "recipe.json") == recipe
    assert hk.Recipe(ratio=0.5, recover="self").recover == hk.Recovery()
    with pytest.raises(UsageError, match="did you mean 'tokens'"):
        hk.Recipe.from_dict({"ratio": 0.5, "recover": {"tokns": 3}})


# The commands.

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
SMALL = [
    "--samples",
    "3",
    "--seq-len",
    "16",
    "--align",
    "4",
    "--text",
    "text.txt",
    "--block",
    "32",
    "--max-blocks",
    "3",
]
RECOVERY = ["--recover-text", "text.txt", "--recover-seq-len", "16", "--recover-tokens", "2560", "--learning-rate"]
RECOVERY += ["0.002", "--tune", "full", "--checks", "4"]


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def test_prune_recovers_and_says_so(here, capsys):
    assert (
        main(["prune", "model", "-o", "out", "--ratio", "0.3", "--calib", "text.txt", *SMALL, "--recover", *RECOVERY])
        == 0
    )
    printed = capsys.readouterr().out
    assert "divergence from the dense model on held-out text" in printed
    record = json.loads((here / "out" / "hywia.json").read_text())
    (_, first), (_, last) = record["recovery"]["divergences"][0], record["recovery"]["divergences"][-1]
    assert last < first
    assert record["recipe"]["recover"]["tune"] == "full"
    assert record["plan"]["parameters_after"] < record["plan"]["parameters_before"]
    assert record["kept_units"]
    assert "recovered" in (here / "out" / "README.md").read_text().lower()
    assert not beside("out").exists()
    # The same in Python: the same weights.
    model, tokenizer = hk.load("model")
    hk.compress(model, tokenizer, hk.Recipe.read("out/hywia.json"))
    assert same(state(model), state(hk.load("out")[0]))


def test_a_kill_during_recovery_leaves_a_model_that_recover_goes_on_with(here):
    command = [sys.executable, "-c", "import sys\nfrom hywia_kernels.cli import main\nsys.exit(main(sys.argv[1:]))"]
    words = ["prune", "model", "-o", "out", "--ratio", "0.3", "--calib", "text.txt", *SMALL, "--no-eval", "--recover"]
    words += [*RECOVERY, "--recover-tokens", "640000", "--checks", "1000"]
    run = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = 120
    while not list(beside("out").glob("checkpoints/checkpoint-*/trainer_state.json")):
        try:
            run.wait(0.05)
        except subprocess.TimeoutExpired:
            deadline -= 0.05
            assert deadline > 0, "no checkpoint was written in time"
            continue
        raise AssertionError(run.stdout.read())
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert "recovery" not in json.loads((here / "out" / "hywia.json").read_text())
    cut, _ = hk.load("out")  # whole, and not recovered
    result = subprocess.run(
        [*command, "recover", "out", "--no-eval", "--recover-tokens", "640000", "--patience", "1"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((here / "out" / "hywia.json").read_text())
    assert record["recovery"]["kept"]
    recovered, _ = hk.load("out")
    assert not same(state(cut), state(recovered))


def test_recover_is_a_command_of_its_own(here, capsys):
    assert main(["prune", "model", "-o", "out", "--ratio", "0.3", "--calib", "text.txt", *SMALL, "--no-eval"]) == 0
    before = (here / "out" / "model.safetensors").read_bytes()
    words = ["recover", "out", "-o", "better", *RECOVERY, "--text", "text.txt", "--block", "32", "--max-blocks", "3"]
    assert main([*words, "--json", "r.json"]) == 0
    assert (here / "out" / "model.safetensors").read_bytes() == before
    dense, cut, better = (hk.load(name)[0] for name in ("model", "out", "better"))
    ids = hk.calibration(None, hk.load("model")[1], "text.txt", samples=20, seq_len=16, seed=9)
    assert kl(dense, better, ids) < kl(dense, cut, ids)
    assert json.loads((here / "r.json").read_text())["recovery"]["kept"]
    record = json.loads((here / "better" / "hywia.json").read_text())
    assert record["plan"]["ratio"] == 0.3
    assert record["evaluation"]["after"]["perplexity"] < record["evaluation"]["before"]["perplexity"]


def test_settings_of_a_recovery_want_one(here, capsys):
    assert main(["prune", "model", "-o", "out", "--ratio", "0.3", "--tune", "lora"]) == 2
    assert "tune: goes with --recover" in capsys.readouterr().err


def test_what_a_recovery_takes_is_said_before_it_begins(here, capsys):
    words = ["prune", "model", "-o", "out", "--ratio", "0.3", "--calib", "text.txt", *SMALL, "--no-eval", "--recover"]
    assert main([*words, *RECOVERY]) == 0
    printed = capsys.readouterr().out
    plan, done = printed.index("recovery: full, 2,560 tokens of text.txt"), printed.index("recovered (full)")
    assert plan < printed.index("wrote out without its recovery") < done
    assert main([*words, *RECOVERY, "--dry-run"]) == 0
    assert "recovery " in capsys.readouterr().out


def test_a_gpu_reads_more_where_the_model_is_small(pair, monkeypatch):
    dense, _ = pair
    monkeypatch.setattr(job, "free_bytes", lambda device: 10**12)
    usual = job.resolved(hk.Recovery(), dense, torch.device("cuda"))
    assert (usual.tokens, usual.text_tokens, usual.batch, usual.tune) == (41_943_040, 10_485_760, 64, "full")
    monkeypatch.setattr("hywia_kernels.settings._LARGE_PARAMETERS", 1)
    larger = job.resolved(hk.Recovery(), dense, torch.device("cuda"))
    assert (larger.tokens, larger.text_tokens) == (16_777_216, 4_194_304)
    assert job.resolved(hk.Recovery(), dense, torch.device("cpu")).tokens == 98_304


@pytest.mark.parametrize("tune", ["full", "lora", "scales"])
def test_removed_units_stay_zero_while_a_plan_is_tried(pair, tune):
    dense, _ = pair
    masked = copy.deepcopy(dense)
    plan = make_plan(masked, "both")
    hk.mask(masked, plan)
    zeros = {name: p == 0 for name, p in masked.named_parameters() if "proj" in name}
    request = job.resolved(small(tune, tokens=400 * 8 * 16), dense, torch.device("cpu"))
    before = kl(dense, masked, IDS[-12:])
    with job.ask(dense, None, request, tokens=IDS) as side:
        assert side.brief_steps == 20
        side.briefly(masked)
    assert sum(int(z.sum()) for z in zeros.values()) > 1000
    assert all((p[zeros[name]] == 0).all() for name, p in masked.named_parameters() if name in zeros)
    assert kl(dense, masked, IDS[-12:]) < before


def test_a_search_tries_its_best_plans_after_a_short_recovery(gqa, tokenizer):
    """Where the recovery is long enough for a twentieth of it to tell something."""
    text = torch.randint(0, 256, (80, 16), generator=torch.Generator().manual_seed(1))
    request = small(tokens=400 * 8 * 16, text=("self",), text_tokens=1000, checks=2, seq_len=16)
    recipe = hk.Recipe(ratio=0.3, samples=4, seq_len=16, align=4, reconstruct_samples=8, recover=request)
    result = hk.compress(gqa, tokenizer, recipe, tokens=text)
    searched = result.record["plan"]["search"] if "plan" in result.record else result.plan.record["search"]
    followed = [c["followed"] for c in searched["candidates"] if "followed" in c]
    assert len(followed) == 2
    chosen = next(c for c in searched["candidates"] if c["chosen"])
    assert chosen["followed"] == min(followed)
    assert result.record["recovery"]["kept"]
