"""Which backend takes a call: named, from the environment, or automatic."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from hywia_kernels import BackendError, UsageError, ops
from hywia_kernels.ops import BACKENDS, cuda, native, reference, registry, triton
from tests.support.operands import interpreted

W = torch.ones(4, 6)
V = torch.ones(4)
KEEP = torch.arange(2)
CALLS = {
    "taylor_importance": lambda **options: ops.taylor_importance(W, W, axis=0, **options),
    "compact": lambda **options: ops.compact(W, KEEP, **options),
    "attention_fusion": lambda **options: ops.attention_fusion(V, V, **options),
}
NUMBER = itertools.count()  # what is logged once per message is new in every test


@pytest.fixture
def off(monkeypatch):
    """Switch backends off, for a reason that no other test has used."""
    real = registry._unavailable

    def switch(*names):
        reason = f"switched off by test {next(NUMBER)}"
        monkeypatch.setattr(registry, "_unavailable", lambda name: reason if name in names else real(name))
        return reason

    return switch


@pytest.fixture
def ran(monkeypatch):
    """The backends whose own functions ran, in order."""
    seen: list[str] = []

    def spy(name, real):
        def run(*args):
            seen.append(name)
            return real(*args)

        return run

    for name, module in (("reference", reference), ("native", native)):
        for op in module.OPS:
            monkeypatch.setattr(module, op, spy(name, getattr(module, op)))
    return seen


def need_native():
    if native.unavailable() is not None:
        pytest.skip(native.unavailable())


@pytest.mark.parametrize("op", CALLS)
def test_unknown_backend(op, monkeypatch):
    message = r"^{}: expected one of reference, native, triton, cuda, got 'magic'$"
    with pytest.raises(BackendError, match=message.format("backend")):
        CALLS[op](backend="magic")
    monkeypatch.setenv("HYWIA_BACKEND", "magic")
    with pytest.raises(BackendError, match=message.format("HYWIA_BACKEND")):
        CALLS[op]()


def test_backend_errors_are_usage_errors():
    assert issubclass(BackendError, UsageError)
    assert issubclass(BackendError, ValueError)


@pytest.mark.parametrize("op", CALLS)
def test_a_named_backend_that_is_off_never_falls_back(op, off, ran, monkeypatch):
    reason = off("native")
    with pytest.raises(BackendError) as caught:
        CALLS[op](backend="native")
    assert str(caught.value) == f"backend: 'native' is off on this machine: {reason}; leave backend unset"
    monkeypatch.setenv("HYWIA_BACKEND", "native")
    with pytest.raises(BackendError) as caught:
        CALLS[op]()
    assert str(caught.value) == f"HYWIA_BACKEND: 'native' is off on this machine: {reason}; leave HYWIA_BACKEND unset"
    assert ran == []


@pytest.mark.parametrize("name", BACKENDS)
def test_require(name):
    reason = registry._unavailable(name)
    if reason is None:
        assert ops.require(name) is None
    else:
        with pytest.raises(BackendError) as caught:
            ops.require(name, "--backend")
        assert str(caught.value) == f"--backend: {name!r} is off on this machine: {reason}; leave --backend unset"
    with pytest.raises(BackendError, match=r"--backend: expected one of .*, got 'none'"):
        ops.require("none", "--backend")


def test_an_op_that_a_backend_lacks(monkeypatch, off):
    off()
    monkeypatch.setattr(native, "OPS", ("compact",))
    need_native()
    with pytest.raises(BackendError) as caught:
        CALLS["taylor_importance"](backend="native")
    assert str(caught.value) == (
        "backend: 'native' cannot run taylor_importance here: it does not implement taylor_importance; "
        "leave backend unset for the automatic choice"
    )
    assert CALLS["compact"](backend="native").shape == (2, 6)


def test_tensors_that_a_backend_cannot_take():
    need_native()
    elsewhere = torch.ones(4, 6, device="meta")
    with pytest.raises(BackendError) as caught:
        registry.choose("taylor_importance", "native", elsewhere, elsewhere)
    assert str(caught.value) == (
        "backend: 'native' cannot run taylor_importance here: it takes tensors on the CPU, got meta; "
        "leave backend unset for the automatic choice"
    )
    assert reference.unsupported("compact", elsewhere) is None
    assert native.unsupported("compact", W) is None
    wrong = elsewhere if interpreted() else W
    mode = "under" if interpreted() else "without"
    device = "cpu" if interpreted() else "cuda"
    assert triton.unsupported("compact", wrong) == (
        f"{mode} TRITON_INTERPRET=1 it takes tensors on {device}, got {wrong.device}"
    )
    assert cuda.unsupported("compact", W) == "it takes tensors on a GPU, got cpu"


@pytest.mark.parametrize(
    ("weight", "grad", "fisher", "refused"),
    [
        ("bfloat16", "bfloat16", "bfloat16", None),
        ("bfloat16", "float32", "float32", None),
        ("bfloat16", "bfloat16", "float32", None),
        ("float16", "float32", None, None),
        ("float32", None, "float32", None),
        ("float32", "bfloat16", None, "grad: it takes torch.float32 (the weight's) or torch.float32, got "),
        ("bfloat16", "float16", None, "grad: it takes torch.bfloat16 (the weight's) or torch.float32, got "),
        ("bfloat16", None, "float16", "fisher: it takes torch.bfloat16 (the weight's) or torch.float32, got "),
        ("bfloat16", "float32", "bfloat16", "fisher: it takes torch.float32 (the gradient's) or torch.float32, got "),
    ],
)
def test_dtypes_of_the_cuda_kernels(weight, grad, fisher, refused):
    made = [None if d is None else torch.ones(1, dtype=getattr(torch, d)) for d in (weight, grad, fisher)]
    got = cuda._dtypes(*made)
    assert got is None if refused is None else got.startswith(refused)


@pytest.mark.parametrize("op", CALLS)
def test_the_automatic_choice_on_the_cpu(op, ran):
    need_native()
    CALLS[op]()
    assert ran == ["native"]
    assert ops.choose(op, None, W) == "native"


@pytest.mark.parametrize("op", CALLS)
def test_the_environment_variable_and_the_argument(op, ran, monkeypatch):
    need_native()
    monkeypatch.setenv("HYWIA_BACKEND", "reference")
    CALLS[op]()
    assert ran == ["reference"]
    CALLS[op](backend="native")
    assert ran == ["reference", "native"]
    monkeypatch.setenv("HYWIA_BACKEND", "native")
    CALLS[op](backend="reference")
    CALLS[op]()
    assert ran == ["reference", "native", "reference", "native"]
    monkeypatch.setenv("HYWIA_BACKEND", "")  # empty is unset
    CALLS[op]()
    assert ran[-1] == "native"
    monkeypatch.setenv("HYWIA_BACKEND", "magic")
    CALLS[op](backend="reference")  # what is not consulted is not judged
    assert ran[-1] == "reference"


@pytest.mark.parametrize("op", CALLS)
def test_the_automatic_choice_falls_back_and_says_so_once(op, off, ran, caplog):
    reason = off("native")
    with caplog.at_level(logging.WARNING, logger="hywia_kernels"):
        for _ in range(3):
            CALLS[op]()
    assert ran == ["reference"] * 3
    assert [r.getMessage() for r in caplog.records] == [f"{op} on cpu: not using backend 'native': {reason}"]
    assert caplog.records[0].name == "hywia_kernels.ops.registry"


def test_the_first_choice_says_nothing(caplog):
    need_native()
    with caplog.at_level(logging.DEBUG, logger="hywia_kernels"):
        for call in CALLS.values():
            call()
    assert caplog.records == []


def test_preference_on_a_gpu(monkeypatch, off):
    """The order, without a GPU: every backend claims to be on and to take anything."""
    monkeypatch.setattr(registry, "_unavailable", lambda name: None)
    for module in (native, triton, cuda):
        monkeypatch.setattr(module, "unsupported", lambda op, *tensors: None)

    class OnGpu:
        device = torch.device("cuda", 0)

    class Elsewhere:
        device = torch.device("mps")

    assert ops.choose("taylor_importance", None, OnGpu()) == "cuda"
    assert ops.choose("compact", None, OnGpu()) == "cuda"
    assert ops.choose("attention_fusion", None, OnGpu()) == "triton"
    assert ops.choose("taylor_importance", None, Elsewhere()) == "reference"
    reason = f"no such dtypes, says test {next(NUMBER)}"
    monkeypatch.setattr(cuda, "unsupported", lambda op, *tensors: reason)
    assert ops.choose("taylor_importance", None, OnGpu()) == "triton"
    off("cuda", "triton")
    assert ops.choose("compact", None, OnGpu()) == "reference"


def test_availability():
    states = ops.availability()
    assert tuple(s.name for s in states) == BACKENDS
    by_name = {s.name: s for s in states}
    reference = by_name["reference"]
    assert (reference.on, reference.reason) == (True, "")
    assert set(reference.ops) == set(registry.PREFERENCE["cpu"]) == set(registry.PREFERENCE["cuda"])
    for device, preferred in registry.PREFERENCE.items():
        for op, names in preferred.items():
            assert names[-1] == "reference", (device, op)
    assert {"taylor_importance", "taylor_importance_batch", "compact"} <= set(by_name["cuda"].ops) < set(reference.ops)
    for name in ("native", "triton"):
        assert {"taylor_importance", "taylor_importance_batch"} <= set(by_name[name].ops) <= set(reference.ops)
    for state in states:
        assert state.on == (state.reason == "")
    if not torch.cuda.is_available():
        assert not by_name["cuda"].on
    if interpreted():
        assert by_name["triton"].on


def test_availability_with_a_backend_off(off):
    reason = off("native", "triton")
    states = {s.name: s for s in ops.availability()}
    assert (states["native"].on, states["native"].reason) == (False, reason)
    assert (states["triton"].on, states["triton"].reason) == (False, reason)
    assert states["native"].ops == native.OPS


@pytest.mark.parametrize("module", [native, cuda])
def test_an_extension_that_was_not_built(module, monkeypatch):
    monkeypatch.setattr(module, "_extension", lambda: ModuleNotFoundError("No module named 'hywia_kernels._x'"))
    assert "extension was not built" in module.unavailable()
    assert "reinstall with HYWIA_BUILD=" in module.unavailable()
    monkeypatch.setattr(module, "_extension", lambda: ImportError("undefined symbol: omp_get"))
    assert "extension does not load (undefined symbol: omp_get)" in module.unavailable()
