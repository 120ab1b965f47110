"""Passes under other people's modes, threads and interrupts: the same results, and everything as it was."""

from __future__ import annotations

import copy
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from state import assert_same, model_state, process_state

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.engine import passes, patches, rotary
from hywia_kernels.method.head_residual import head_residuals
from tests.support.tiny import TINY, fresh, make_plan

ORDERS = ("first", "second", "mixed")


def equal(one, two):
    assert one.fine.keys() == two.fine.keys()
    for name in one.fine:
        assert all(torch.equal(one.fine[name][o], two.fine[name][o]) for o in ORDERS), name
        assert torch.equal(one.coarse[name], two.coarse[name]), name


class Default:
    """A default dtype or device for a while."""

    def __init__(self, set_it, value, back):
        self.set_it, self.value, self.back = set_it, value, back

    def __enter__(self):
        self.set_it(self.value)

    def __exit__(self, *error):
        self.set_it(self.back)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of another device": lambda: torch.autocast("cuda", torch.float16, enabled=True),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "anomaly": torch.autograd.detect_anomaly,
    "default float64": lambda: Default(torch.set_default_dtype, torch.float64, torch.float32),
    "default bfloat16": lambda: Default(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: Default(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "deterministic": lambda: Default(torch.use_deterministic_algorithms, True, False),
    "narrow products": lambda: Default(torch.set_float32_matmul_precision, "medium", "highest"),
    "saved on the host": torch.autograd.graph.save_on_cpu,
}
# What torch itself does in float32 under "narrow products" is the caller's affair.
INEXACT = {"narrow products"}


@pytest.mark.filterwarnings("ignore:User provided device_type:UserWarning", "ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_the_same_statistics_under_any_mode(gqa, tokens, mode, way):
    want = hk.calibrate(gqa, tokens, **way)
    with MODES[mode]():
        before, model = process_state(), model_state(gqa)
        got = hk.calibrate(gqa, tokens, **way)
        assert_same(before, process_state())
        assert_same(model, model_state(gqa))
    if mode not in INEXACT:
        equal(got, want)
    assert not any(t.is_inference() for t in got.coarse.values())
    assert got.fingerprint == want.fingerprint


@pytest.mark.filterwarnings("ignore:User provided device_type:UserWarning", "ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("mode", [m for m in MODES if m not in INEXACT])
def test_the_same_model_under_any_mode(mode, tokens):
    """What heads leave over, refitting and cutting."""
    made = []
    for context in (nullcontext, MODES[mode]):
        model = fresh(TINY[2])
        plan = make_plan(model, "both")
        with context():
            before = process_state()
            left = head_residuals(model, tokens)
            after = hk.reconstruct(model, plan, tokens)
            hk.prune(model, after)
            assert_same(before, process_state())
        assert not any(p.is_inference() for p in model.parameters())
        made.append((left, {n: p.detach() for n, p in model.named_parameters()}))
    for one, two in zip(made[0], made[1], strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[n], two[n]) for n in one)


def test_training_goes_on_where_it_was(gqa, tokens, way):
    """Between backward and step, in train mode with dropout, gradient checkpointing and a scaler of gradients."""
    want = hk.calibrate(gqa, tokens, **way)
    for module in gqa.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    gqa.train()
    gqa.gradient_checkpointing_enable() if not hasattr(
        gqa, "activation_checkpointing_enable"
    ) else gqa.activation_checkpointing_enable()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(gqa(tokens, labels=tokens).loss).backward()
    model, scale = model_state(gqa), scaler.state_dict()
    equal(hk.calibrate(gqa, tokens, **way), want)
    assert_same(model, model_state(gqa))
    assert scaler.state_dict() == scale


def test_a_layer_that_was_compiled_is_measured_as_it_is(gqa, tokens, way):
    want = hk.calibrate(gqa, tokens, **way)

    def refuse(*args, **kwargs):
        raise AssertionError("compiled code does not know what stands in for the modules")

    vars(gqa.model.layers[1])["_compiled_call_impl"] = refuse
    vars(gqa.model.layers[2].mlp)["_compiled_call_impl"] = refuse
    state = model_state(gqa)
    equal(hk.calibrate(gqa, tokens, **way), want)
    head_residuals(gqa, tokens)
    assert_same(state, model_state(gqa))


def test_two_threads_at_once(tokens):
    """Of one model, and of two: every thread's own results, and nothing left behind."""
    one, two = fresh(TINY[2]), fresh(TINY[3])
    want = {id(m): hk.calibrate(m, tokens) for m in (one, two)}
    before, states = process_state(), [model_state(m) for m in (one, two)]
    got, failed = [], []

    def score(model):
        try:
            for _ in range(3):
                got.append((model, hk.calibrate(model, tokens)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=score, args=(m,)) for m in (one, two, one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(got) == 12
    for model, statistics in got:
        equal(statistics, want[id(model)])
    assert_same(before, process_state())
    for model, state in zip((one, two), states, strict=True):
        assert_same(state, model_state(model))


@pytest.mark.parametrize("order", ["first out", "last out"])
def test_settings_of_the_process_nest_in_any_order(gqa, order, monkeypatch):
    """Two holders that interleave, as threads' do: what was there before the first comes back after the last."""
    monkeypatch.setattr(rotary, "usable", lambda device, backend: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before, rotation = process_state(), model_state(gqa)["rotation"]
    for make in (lambda: patches.reproducible(True), lambda: rotary.rotary_replaced(gqa, None)):
        one, two = make(), make()
        one.__enter__(), two.__enter__()
        inside = process_state(), model_state(gqa)["rotation"]
        leaving = (one, two) if order == "first out" else (two, one)
        leaving[0].__exit__(None, None, None)
        assert (process_state(), model_state(gqa)["rotation"]) == inside != (before, rotation)
        leaving[1].__exit__(None, None, None)
        assert (process_state(), model_state(gqa)["rotation"]) == (before, rotation)


@pytest.mark.parametrize("mine", [None, ":16:8"])
def test_a_users_own_settings_stay(gqa, mine, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if mine is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", mine)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = process_state()
        with patches.reproducible(True):
            assert torch.get_deterministic_debug_mode() == 2
        assert_same(before, process_state())
    finally:
        torch.use_deterministic_algorithms(False)


class Interrupt:
    """KeyboardInterrupt at the n-th line of this package that runs in this thread."""

    def __init__(self, at=None):
        self.at, self.lines = at, 0

    def __enter__(self):
        sys.settrace(self.call)
        return self

    def __exit__(self, kind, error, trace):
        sys.settrace(None)
        return kind is KeyboardInterrupt

    def call(self, frame, event, argument):
        return self.line if "/hywia_kernels/" in frame.f_code.co_filename else None

    def line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self.line


def work(model, tokens, what):
    if what == "leftover":
        return head_residuals(model, tokens)
    if what == "learn":
        scores = hk.score(model, criterion="random")
        plan = hk.plan(scores, group_ratio=0.4, align=4)
        return hk.learn_masks(model, scores, plan, tokens, steps=1, batch=2)
    return hk.calibrate(model, tokens[:2, :5], engine=what[0], memory=what[1])


WORKS = [("fused", "fast"), ("fused", "lean"), ("fused", "layerwise"), ("autograd", "lean"), "leftover", "learn"]


@pytest.mark.parametrize("what", WORKS, ids=str)
def test_an_interrupt_at_any_line_leaves_everything_as_it_was(what, tokens, monkeypatch):
    """At all of the work's last lines, where things are put back, and at some of the others."""
    # So that there is something to put back, without Triton's interpreter, which is slow.
    monkeypatch.setattr(rotary, "usable", lambda device, backend: True)
    monkeypatch.setattr(rotary, "rotated", lambda original: lambda *a, **k: original(*a, **k))
    monkeypatch.setattr("hywia_kernels.engine.memory.CHUNK_TOKENS", 5)
    model = fresh(TINY[2])
    model.train()
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    with Interrupt() as whole:
        work(model, tokens, what)
    before, state = process_state(), model_state(model)
    some = range(1, whole.lines + 1, max(1, whole.lines // 20))
    last = range(max(1, whole.lines - 70), whole.lines + 1)
    for at in (*some, *last):
        with Interrupt(at):
            work(model, tokens, what)
        assert_same(before, process_state())
        assert_same(state, model_state(model))
        assert not patches.STRICT.holders()
        assert not rotary.REPLACED.holders()
        assert is_free()


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", [1, 3])
def test_an_error_from_a_users_hook(gqa, tokens, error, at, way):
    calls = []

    def hook(module, arguments, output):
        calls.append(1)
        if len(calls) % at == 0:
            raise error("from a hook")

    for layer in gqa.model.layers:
        layer.mlp.up_proj.register_forward_hook(hook)
    before, state = process_state(), model_state(gqa)
    # Running out of memory gets this package's own message.
    with pytest.raises(HywiaError if error is torch.OutOfMemoryError else error):
        hk.calibrate(gqa, tokens, **way)
    assert len(calls) == at
    assert_same(before, process_state())
    assert_same(state, model_state(gqa))


def test_a_pass_inside_a_pass(gqa, tokens):
    """A hook may measure another model."""
    other, inner = fresh(TINY[3]), []
    want = hk.calibrate(other, tokens)
    gqa.model.layers[1].mlp.register_forward_hook(lambda *a: inner.append(hk.calibrate(other, tokens)))
    state = process_state()
    outer = hk.calibrate(gqa, tokens, memory="fast")
    assert_same(state, process_state())
    assert outer.record["samples"] == 4
    equal(inner[0], want)


def is_free():
    """Whether another thread could begin a pass."""
    free = []

    def take():
        free.append(passes._LOCK.acquire(timeout=5))
        if free[0]:
            passes._LOCK.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return free == [True]


def test_the_lock_is_let_go(gqa, tokens):
    with pytest.raises(HywiaError, match="vocabulary"):
        hk.calibrate(gqa, tokens + 1000)
    assert is_free()


def test_copies_are_as_good(gqa, tokens):
    """Nothing of a pass stays in the model: a copy made afterwards gives the same statistics."""
    want = hk.calibrate(gqa, tokens)
    equal(hk.calibrate(copy.deepcopy(gqa), tokens), want)


def test_an_op_without_a_deterministic_kernel_is_run_without_asking_for_one():
    asked = []

    def run(strict):
        asked.append(strict)
        if strict:
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return len(asked)

    assert patches.reproducibly(run, True) == (2, False)
    assert patches.reproducibly(run, False) == (3, True)
    assert asked == [True, False, False]
    with pytest.raises(RuntimeError, match="out of memory"):
        patches.reproducibly(lambda strict: (_ for _ in ()).throw(RuntimeError("out of memory")), True)
