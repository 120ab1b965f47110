"""What widths a device likes, and how fast it would run a model: read from sweeps, not from folklore.

A target is a JSON file beside this one, written by `python -m benchmarks.bench_width --profile`: the time of a linear
layer's products at every multiple of 64, and, between them, what narrower alignments cost. From it come

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

    from .cost import Work

__all__ = ["NAMES", "Prediction", "Target", "at_hand", "predict", "resolve"]

# Devices that borrow another's profile, and devices that were not measured. NVIDIA's guide to matrix products says that
# dimensions should be multiples of 128 bytes on A100: 64 elements of 2 bytes. A CPU's rows should be whole cache lines
# and AVX-512 vectors: 16 elements of 4 bytes.
_BORROWED = {"h200": ("NVIDIA H200", "h100"), "gh200": ("NVIDIA GH200", "h100")}
_DOCUMENTED = {"a100": 64, "cpu": 16}
_DEFAULT_ALIGN = 64


@dataclass(frozen=True)
class Target:
    """One device.

    Attributes:
        name, device, source: what it is called here, the device, and by which command and when the figures were
            measured ("" for not measured).
        align: widths are multiples of it.
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
        """The device, and whose the figures are if not its own; `instead`: what serves where there are none."""
        if self.measured:
            return self.device
        if self.borrowed:
            return f"{self.device} (not measured; figures of {self.borrowed})"
        return f"{self.device} (not measured{instead})"

    def tokens(self) -> list[int]:
        """Prompt lengths times batches that were measured."""
        return sorted(self.tflop_s["up"]) if self.has_rates else []

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
        if not self.has_rates:
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


def _profiles() -> Any:
    return resources.files(__package__) / "profiles"


def _names() -> list[str]:
    return sorted(f.name.removesuffix(".json") for f in _profiles().iterdir() if f.name[-5:] == ".json")


NAMES = (*_names(), *_BORROWED, *_DOCUMENTED)


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
        return _lent(_own(owner), name, device_name)
    if name in NAMES:
        return _own(name)
    if Path(name).suffix == ".json" and Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"target: cannot read {name} as UTF-8 text: {error}") from error
        return _read(Path(name).stem, text)
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
    like = [_own(p) for p in _names() if _capability(p) == capability]
    for known in like:
        if known.device == name:
            return known
    for known in like:
        if known.device.partition(" ")[0] == name.partition(" ")[0]:
            return _lent(known, "auto", name)
    for part, align in _DOCUMENTED.items():
        if part in re.split(r"[^a-z0-9]+", name.lower()):
            return Target(part, name, "", align, {}, 0.0, 0.0)
    return Target("auto", name, "", _DEFAULT_ALIGN, {}, 0.0, 0.0)


def _text(name: str) -> str:
    return (_profiles() / f"{name}.json").read_text(encoding="utf-8")


def _own(name: str) -> Target:
    return _read(name, _text(name))


def _capability(name: str) -> tuple[int, ...]:
    return tuple(json.loads(_text(name)).get("capability", ()))


def _lent(profile: Target, name: str, device: str) -> Target:
    """A device's figures for another like it."""
    return replace(profile, name=name, device=device, borrowed=profile.device)


def _read(name: str, text: str) -> Target:
    try:
        found: dict[str, Any] = json.loads(text)
        rates = {
            form: {int(t): {int(w): float(r) for w, r in widths.items()} for t, widths in tokens.items()}
            for form, tokens in found["tflop_s"].items()
        }
        target = Target(
            name,
            str(found["device"]),
            str(found["source"]),
            int(found["align"]),
            rates,
            float(found["matmul_tflop_s"]),
            float(found["copy_gb_s"]),
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
    if not target.has_rates:
        return work.prefill_flops(1, tokens)
    products = 0.0
    for outputs, inputs in work.matrices:
        # The side that is not the hidden size is the width.
        form, width = ("up", outputs) if inputs == work.hidden else ("down", inputs)
        products += 2.0 * tokens * outputs * inputs / target.rate(form, tokens, width)
    rest = work.prefill_flops(1, tokens) - 2.0 * tokens * sum(n * k for n, k in work.matrices)
    return products + rest / target.matmul_tflop_s
