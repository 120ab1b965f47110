"""Which widths a device runs well, and how fast it would run a model, both from measured sweeps.

A profile is a JSON file of the folder `profiles`, written by `python -m benchmarks.bench_width --profile`: the rates of
a linear layer's products at every multiple of 64, and, between them, what narrower alignments cost. From it come

* the alignment: the smallest power of two that no wider one beats by more than 3 %;
* the widths worth keeping: those for which no wider one is as fast (a product runs in whole waves of tiles, so its time
  is a staircase, and a width just above a step pays for channels that it does not have);
* the predicted speed-up of a plan.

A profile is of one device, told by its full name and compute capability. Another of the same architecture (an H200, an
H100 on PCIe, a slice of one) has other clocks, memory and multiprocessors: it borrows the figures, and says so.
"""

from __future__ import annotations

import bisect
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    import torch

    from .cost import Cost

__all__ = ["NAMES", "Prediction", "Target", "at_hand", "predict", "resolve"]

# Devices that borrow another's profile, and devices that were not measured. NVIDIA's guide to matrix products says that
# dimensions should be multiples of 128 bytes on A100: 64 elements of 2 bytes. A CPU's rows should be whole cache lines
# and AVX-512 vectors: 16 elements of 4 bytes.
_BORROWED = {"h200": ("NVIDIA H200", "h100"), "gh200": ("NVIDIA GH200", "h100")}
_DOCUMENTED = {"a100": 64, "cpu": 16}
_DEFAULT_ALIGN = 64


@dataclass(frozen=True)
class Target:
    """A device to plan for.

    Attributes:
        name, device, source: what it is called here, the device, and by which command and when the figures were
            measured ("" for not measured).
        align: what widths are to be multiples of.
        tflop_s: form ("up" `[tokens, hidden] x [hidden, width]`, "down" the other way) -> tokens -> width -> rate.
        matmul_tflop_s, copy_gb_s: the device's ceilings in the same run; 0 where not measured.
        borrowed: the device that the figures are of, where that is another; "" where it is this one.
    """

    name: str
    device: str
    source: str
    align: int
    tflop_s: Mapping[str, Mapping[int, Mapping[int, float]]]
    matmul_tflop_s: float
    copy_gb_s: float
    borrowed: str = ""

    @property
    def has_rates(self) -> bool:
        """Whether there are figures, of this device or of one like it."""
        return bool(self.tflop_s)

    @property
    def measured(self) -> bool:
        """Whether the figures are this device's own."""
        return self.has_rates and not self.borrowed

    def described(self, instead: str = "") -> str:
        """The device, and whose the figures are if not its own; `instead` says what serves where there are none."""
        if self.measured:
            return self.device
        if self.borrowed:
            return f"{self.device} (not measured; figures of {self.borrowed})"
        return f"{self.device} (not measured{instead})"

    def tokens(self) -> list[int]:
        """The measured numbers of tokens (prompt length times batch), ascending; empty where nothing was measured."""
        return sorted(self.tflop_s["up"]) if self.has_rates else []

    def rate(self, form: str, tokens: int, width: int) -> float:
        """TFLOP/s of a product: between measured widths by interpolating its time, outside them the nearest width's."""
        table = self.tflop_s[form][tokens]
        widths = sorted(table)
        at = bisect.bisect_left(widths, width)
        if at == 0 or at == len(widths):
            return table[widths[min(at, len(widths) - 1)]]
        low, high = widths[at - 1], widths[at]
        slow, fast = low / table[low], high / table[high]  # times, up to the factor that all widths share
        return width / (slow + (fast - slow) * (width - low) / (high - low))

    def pareto_widths(self, widths: Sequence[int]) -> list[int]:
        """Those of ascending `widths` that are faster than every wider one, over all measured forms and tokens."""
        if not self.has_rates:
            return list(widths)
        kept: list[int] = []
        shortest = float("inf")
        for width in sorted(widths, reverse=True):
            # Two matrices make a channel's output (gate and up), and one takes it (down).
            time = sum(
                width * (2 / self.rate("up", t, width) + 1 / self.rate("down", t, width)) / t for t in self.tokens()
            )
            if time < shortest * 0.999:
                kept.append(width)
                shortest = time
        return kept[::-1]


def _profiles() -> Any:
    return resources.files(__package__) / "profiles"


def _shipped_names() -> list[str]:
    return sorted(f.name.removesuffix(".json") for f in _profiles().iterdir() if f.name[-5:] == ".json")


NAMES = (*_shipped_names(), *_BORROWED, *_DOCUMENTED)


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
    if name in _BORROWED:
        device_name, owner = _BORROWED[name]
        return _borrowing(_shipped(owner), name, device_name)
    if name in NAMES:
        return _shipped(name)
    if Path(name).suffix == ".json" and Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"target: cannot read {name} as UTF-8 text: {error}") from error
        return _parsed(Path(name).stem, text)
    raise UsageError(
        f"target: expected one of {', '.join(NAMES)}, auto, or a .json profile, got {name!r}; "
        "python -m benchmarks.bench_width --profile FILE measures the device at hand"
    )


def at_hand(device: torch.device | None = None) -> Target:
    """The target of a device (None: the first GPU, else the CPU).

    A profile serves the device of its name and capability, and is lent to others of the same vendor and capability; one
    that is like none of them gets multiples of 64.
    """
    import torch

    kind = device.type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind in _DOCUMENTED:
        return resolve(kind)
    if kind != "cuda":
        return Target("auto", kind, "", _DEFAULT_ALIGN, {}, 0.0, 0.0)
    name, capability = torch.cuda.get_device_name(device), tuple(torch.cuda.get_device_capability(device))
    like = [_shipped(p) for p in _shipped_names() if _capability(p) == capability]
    for known in like:
        if known.device == name:
            return known
    for known in like:
        if known.device.partition(" ")[0] == name.partition(" ")[0]:
            return _borrowing(known, "auto", name)
    for part, align in _DOCUMENTED.items():
        if part in re.split(r"[^a-z0-9]+", name.lower()):
            return Target(part, name, "", align, {}, 0.0, 0.0)
    return Target("auto", name, "", _DEFAULT_ALIGN, {}, 0.0, 0.0)


def _shipped_text(name: str) -> str:
    return (_profiles() / f"{name}.json").read_text(encoding="utf-8")


def _shipped(name: str) -> Target:
    return _parsed(name, _shipped_text(name))


def _capability(name: str) -> tuple[int, ...]:
    return tuple(json.loads(_shipped_text(name)).get("capability", ()))


def _borrowing(profile: Target, name: str, device: str) -> Target:
    """A device's figures for another like it."""
    return replace(profile, name=name, device=device, borrowed=profile.device)


def _parsed(name: str, text: str) -> Target:
    try:
        profile: dict[str, Any] = json.loads(text)
        rates = {
            form: {int(t): {int(w): float(r) for w, r in widths.items()} for t, widths in tokens.items()}
            for form, tokens in profile["tflop_s"].items()
        }
        target = Target(
            name,
            str(profile["device"]),
            str(profile["source"]),
            int(profile["align"]),
            rates,
            float(profile["matmul_tflop_s"]),
            float(profile["copy_gb_s"]),
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"target: {name} is no profile of bench_width ({error!r})") from error
    flaw = _flaw(target)
    if flaw is not None:
        raise UsageError(f"target: {name} is no profile of bench_width ({flaw})")
    return target


def _flaw(target: Target) -> str | None:
    """Why a profile's figures cannot be used."""
    forms = target.tflop_s
    if set(forms) != {"up", "down"} or not forms["up"] or forms["up"].keys() != forms["down"].keys():
        return f"expected rates of both forms at the same counts of tokens, got {sorted(forms)}"
    tables = [table for tokens in forms.values() for table in tokens.values()]
    numbers = [target.matmul_tflop_s, target.copy_gb_s, *(rate for table in tables for rate in table.values())]
    if not all(tables) or not all(math.isfinite(n) and n > 0 for n in numbers) or target.align < 1:
        return "expected positive rates, at least one a table, and an alignment of at least 1"
    return None


@dataclass(frozen=True)
class Prediction:
    """Speed-ups of a plan: times before over times after."""

    prefill: Mapping[int, float]  # tokens -> speed-up
    decode: float
    size: float  # weight bytes before over after


def predict(before: Cost, after: Cost, target: Target, context: int = 512) -> Prediction:
    """Speed-up from the measured rates; where nothing was measured, from FLOPs.

    Prefill is predicted for one prompt of each measured length, from the products' times; causal attention's products
    count at the device's ceiling. Decoding is predicted from the bytes that one sequence reads with `context` tokens in
    its cache.
    """
    tokens = target.tokens() or [2048]
    prefill = {t: _prefill_time(before, target, t) / _prefill_time(after, target, t) for t in tokens}
    decode = before.decode_bytes(1, context) / after.decode_bytes(1, context)
    return Prediction(prefill, decode, before.weight_bytes / after.weight_bytes)


def _prefill_time(cost: Cost, target: Target, tokens: int) -> float:
    if not target.has_rates:
        return cost.prefill_flops(1, tokens)
    products = 0.0
    for outputs, inputs in cost.matrices:
        # The side that is not the hidden size is the width.
        form, width = ("up", outputs) if inputs == cost.hidden else ("down", inputs)
        products += 2.0 * tokens * outputs * inputs / target.rate(form, tokens, width)
    rest = cost.prefill_flops(1, tokens) - 2.0 * tokens * sum(n * k for n, k in cost.matrices)
    return products + rest / target.matmul_tflop_s
