"""Times of prefill and decoding, plain and captured."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import progress
from ..engine.patches import frozen
from ..engine.static_driver import StaticDriver, capture, drivable, joined_bytes
from ..errors import UsageError
from ..versions import cache_keyword
from .cost import Cost, cost_of

__all__ = ["Case", "Measurement", "cases", "measure"]

MODES = ("eager", "captured", "static")


@dataclass(frozen=True)
class Case:
    """`phase` "prefill": `batch` prompts of `context` tokens; "decode": one token each in a cache of `context`."""

    phase: str
    batch: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.phase} {self.batch}x{self.context}"


@dataclass(frozen=True)
class Measurement:
    """One case in one mode.

    Attributes:
        ms, ms_p20, ms_p80: median and quantiles over `runs`; latency of a prompt, or of a token.
        tokens_per_second: of all sequences together.
        flop_s, byte_s: FLOPs and bytes a second, counting the least that the case must do (`Cost`): no more than a
            device's ceilings.
        peak_bytes: most memory allocated while it ran (GPU only), of a model that is there once: without the copies
            that the static modes hold beside it, which on a GPU need `joined_bytes` of free memory.
    """

    phase: str
    batch: int
    context: int
    mode: str
    ms: float
    ms_p20: float
    ms_p80: float
    runs: int
    tokens_per_second: float
    flop_s: float
    byte_s: float
    peak_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cases(batches: Sequence[int], contexts: Sequence[int]) -> list[Case]:
    """Prefill and decoding at every batch and context."""
    for name, values in (("batch", batches), ("context", contexts)):
        if not values or any(v < 1 for v in values):
            raise UsageError(f"{name}: expected positive numbers, got {list(values)}")
    return [Case(phase, b, c) for phase in ("prefill", "decode") for b in batches for c in contexts]


def measure(
    model: Any,
    wanted: Sequence[Case],
    *,
    modes: Sequence[str] = MODES,
    runs: int = 10,
    what: str = "bench",
) -> tuple[list[Measurement], str | None]:
    """Time a model, in eval mode, on the device it is on; afterwards it is as it was.

    Args:
        model: a causal language model. wanted: what to time. runs: readings per figure, after three warm-ups.
        what: the name that progress is shown under.
        modes: "eager" runs the model's own forward with its own cache, launch by launch. "static" runs its layers with
            a static cache, compiled, and on a GPU as one CUDA graph; "captured" the same without the compiler, whose
            products then have the widths that they say (the compiler pads odd ones).

    Returns:
        The figures in order, and why "static" and "captured" were left out (None when they were not, or not asked for).
    """
    unknown = [m for m in modes if m not in MODES]
    if unknown or not modes:
        raise UsageError(f"modes: expected some of {', '.join(MODES)}, got {', '.join(modes) or 'none'}")
    if runs < 2:
        raise UsageError(f"runs: expected at least 2, got {runs}")
    reason = drivable(model, max((c.context for c in wanted), default=1)) if set(modes) - {"eager"} else None
    cost = cost_of(model)
    measurements = []
    with frozen(model):
        for case in progress.track(list(wanted), what):
            for mode in modes:
                if mode == "eager":
                    timed = _eager(model, case, runs)
                elif reason is None:
                    timed = _static(model, case, mode == "static", runs)
                else:
                    continue
                measurements.append(_measurement(case, mode, cost, *timed))
    return measurements, reason


def _measurement(case: Case, mode: str, cost: Cost, times: list[float], peak: int | None) -> Measurement:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    median = statistics.median(times)
    decode = case.phase == "decode"
    tokens = case.batch * (1 if decode else case.context)
    flops = 2.0 * case.batch * cost.parameters if decode else cost.prefill_flops(case.batch, case.context)
    read = cost.decode_bytes(case.batch, case.context) if decode else float(cost.step_bytes)
    return Measurement(
        case.phase, case.batch, case.context, mode, median * 1e3, deciles[1] * 1e3, deciles[7] * 1e3, len(times),
        tokens / median, flops / median, read / median, peak,
    )  # fmt: skip


def _device(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device


def _ids(model: Any, batch: int, tokens: int) -> torch.Tensor:
    """Fixed pseudo-random ids `[batch, tokens]`: which they are does not change the time."""
    count = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(count, (batch, tokens), generator=generator).to(_device(model))


def _times(call: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    """Seconds of each run: on a GPU by events, between which its queue never runs empty; on a CPU by the clock."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(runs):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@torch.no_grad()
def _eager(model: Any, case: Case, runs: int) -> tuple[list[float], int | None]:
    device = _device(model)
    _reset_peak(device)
    if case.phase == "prefill":
        ids = _ids(model, case.batch, case.context)
        times = _times(lambda: model(ids, use_cache=True, logits_to_keep=1).logits, device, runs)
        return times, _peak_bytes(device)
    from transformers import DynamicCache

    # The cache grows by one token a step; it ends at `context`.
    before = max(1, case.context - runs - 3)
    cache: Any = {cache_keyword(type(model).forward): DynamicCache(config=model.config)}
    model(_ids(model, case.batch, before), use_cache=True, logits_to_keep=1, **cache)
    token = _ids(model, case.batch, 1)
    times = _times(lambda: model(token, use_cache=True, **cache).logits, device, runs)
    return times, _peak_bytes(device)


@torch.no_grad()
def _static(model: Any, case: Case, compile: bool, runs: int) -> tuple[list[float], int | None]:
    device = _device(model)
    if compile:
        torch._dynamo.reset()  # it keeps eight versions of a layer, and each case is one more
    driver = StaticDriver(model, case.batch, case.context, compile=compile)
    _reset_peak(device)
    ids = _ids(model, case.batch, case.context if case.phase == "prefill" else 1)
    position = torch.tensor([case.context - 1], device=device)

    def call() -> torch.Tensor:
        return driver.prefill(ids) if case.phase == "prefill" else driver.step(ids, position)

    if device.type == "cuda":
        times, peak = _times(capture(call), device, runs), _peak_bytes(device)
        return times, peak and peak - joined_bytes(model)
    with settled(call, compile):
        return _times(call, device, runs), _peak_bytes(device)


@contextlib.contextmanager
def settled(call: Callable[[], object], compile: bool) -> Iterator[None]:
    """Compile first; within, a compiled call checks no more than which of its versions it needs.

    A CUDA graph saves these checks on a GPU. On a CPU those of thirty layers take a tenth of a small model's step.
    """
    if not compile:
        yield
        return
    call()
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        yield
