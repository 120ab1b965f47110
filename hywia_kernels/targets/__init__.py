"""What widths a device likes, and how fast it would run a model: read from sweeps, not from folklore.

A target is a JSON file beside this one, written by `python -m benchmarks.bench_width --profile`: the time of a linear
layer's products at every multiple of 64, and, between them, what narrower alignments cost. From it come

* the alignment: the smallest power of two that no wider one beats by more than 3 %;
* the widths worth keeping: those for which no wider one is as fast (a product runs in whole waves of tiles, so its time
  is a staircase, and a width just above a step pays for channels that it does not have);
* the predicted speed-up of a plan.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..speed.work import Work

__all__ = ["NAMES", "Prediction", "Target", "at_hand", "predict", "resolve"]

# Other names of a measured chip, and devices that were not measured. NVIDIA's guide to matrix products says that
# dimensions should be multiples of 128 bytes on A100: 64 elements of 2 bytes. A CPU's rows should be whole cache lines
# and AVX-512 vectors: 16 elements of 4 bytes.
_SAME = {"h200": "h100"}
_DOCUMENTED = {"a100": 64, "cpu": 16}
_DEFAULT_ALIGN = 64


@dataclass(frozen=True)
class Target:
    """One device.

    Attributes:
        name, device, source: what it is, what was measured, and by which command and when ("" for not measured).
        align: widths are multiples of it.
        tflop_s: form ("up" `[tokens, hidden] x [hidden, width]`, "down" the other way) -> tokens -> width -> rate.
        matmul_tflop_s, copy_gb_s: the device's ceilings in the same run; 0 where not measured.
    """

    name: str
    device: str
    source: str
    align: int
    tflop_s: Mapping[str, Mapping[int, Mapping[int, float]]]
    matmul_tflop_s: float
    copy_gb_s: float

    @property
    def measured(self) -> bool:
        return bool(self.tflop_s)

    def tokens(self) -> list[int]:
        """Prompt lengths times batches that were measured."""
        return sorted(self.tflop_s["up"]) if self.measured else []

    def rate(self, form: str, tokens: int, width: int) -> float:
        """TFLOP/s of a product, between measured widths by interpolation of its time; outside them the nearest's."""
        table = self.tflop_s[form][tokens]
        widths = sorted(table)
        at = bisect.bisect_left(widths, width)
        if at == 0 or at == len(widths):
            return table[widths[min(at, len(widths) - 1)]]
        low, high = widths[at - 1], widths[at]
        slow, fast = low / table[low], high / table[high]  # times, up to the factor that all widths share
        return width / (slow + (fast - slow) * (width - low) / (high - low))

    def worthwhile(self, widths: Sequence[int]) -> list[int]:
        """Of ascending `widths` those that are faster than every wider one, all measured forms and tokens together."""
        if not self.measured:
            return list(widths)
        kept: list[int] = []
        least = float("inf")
        for width in sorted(widths, reverse=True):
            # Two matrices make a channel's output, one takes it.
            time = sum(
                width * (2 / self.rate("up", t, width) + 1 / self.rate("down", t, width)) / t for t in self.tokens()
            )
            if time < least * 0.999:
                kept.append(width)
                least = time
        return kept[::-1]


def _names() -> list[str]:
    return sorted(
        f.name.removesuffix(".json") for f in resources.files(__package__).iterdir() if f.name[-5:] == ".json"
    )


NAMES = (*_names(), *_SAME, *_DOCUMENTED)


def resolve(target: str | Path | None, device: torch.device | None = None) -> Target:
    """A target by name ("h100", "a100", "cpu", ...), from a profile's file, or (None, "auto") for the device at hand.

    Raises:
        UsageError: no such target.
    """
    if target is None or target == "auto":
        return at_hand(device)
    name = str(target)
    if name in _DOCUMENTED:
        return Target(name, name, "", _DOCUMENTED[name], {}, 0.0, 0.0)
    if name in NAMES:
        return _read(name, (resources.files(__package__) / f"{_SAME.get(name, name)}.json").read_text())
    if Path(name).suffix == ".json" and Path(name).is_file():
        return _read(Path(name).stem, Path(name).read_text())
    raise UsageError(
        f"target: expected one of {', '.join(NAMES)}, auto, or a .json profile, got {name!r}; "
        "python -m benchmarks.bench_width --profile FILE measures the device at hand"
    )


def at_hand(device: torch.device | None = None) -> Target:
    """The target of a device (None: the first GPU, else the CPU); one that was not measured gets multiples of 64."""
    kind = device.type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if kind == "cuda" else "cpu"
    for known in NAMES:
        if known in name.lower():
            return resolve(known)
    return Target("auto", name, "", _DEFAULT_ALIGN, {}, 0.0, 0.0)


def _read(name: str, text: str) -> Target:
    try:
        found: dict[str, Any] = json.loads(text)
        rates = {
            form: {int(t): {int(w): float(r) for w, r in widths.items()} for t, widths in tokens.items()}
            for form, tokens in found["tflop_s"].items()
        }
        return Target(
            name,
            found["device"],
            found["source"],
            int(found["align"]),
            rates,
            found["matmul_tflop_s"],
            found["copy_gb_s"],
        )
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"target: {name} is no profile of bench_width ({error!r})") from error


@dataclass(frozen=True)
class Prediction:
    """Times before over times after."""

    prefill: Mapping[int, float]  # tokens -> speed-up
    decode: float
    size: float  # weight bytes before over after


def predict(before: Work, after: Work, target: Target, context: int = 512) -> Prediction:
    """Speed-up from the measured rates; where nothing was measured, from FLOPs.

    Prefill is the products' time, causal attention's counted at the ceiling of products; one prompt of each measured
    count of tokens. Decoding is one sequence, `context` tokens in its cache, by bytes.
    """
    tokens = target.tokens() or [2048]
    prefill = {t: _prefill_time(before, target, t) / _prefill_time(after, target, t) for t in tokens}
    decode = before.decode_bytes(1, context) / after.decode_bytes(1, context)
    return Prediction(prefill, decode, before.weight_bytes / after.weight_bytes)


def _prefill_time(work: Work, target: Target, tokens: int) -> float:
    if not target.measured:
        return work.prefill_flops(1, tokens)
    products = 0.0
    for outputs, inputs in work.matrices:
        # The side that is not the hidden size is the width.
        form, width = ("up", outputs) if inputs == work.hidden else ("down", inputs)
        products += 2.0 * tokens * outputs * inputs / target.rate(form, tokens, width)
    rest = work.prefill_flops(1, tokens) - 2.0 * tokens * sum(n * k for n, k in work.matrices)
    return products + rest / target.matmul_tflop_s
