"""What a recovery is asked for, as one object that holds its defaults; imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError
from ...settings import HOLDS, SELF, TUNES

__all__ = ["Recovery"]


@dataclass(frozen=True)
class Recovery:
    """How a cut model is recovered by distillation from the dense one.

    `None` follows from the models and the device; `tuning.resolved` fills it in, and a record holds the resolved
    request.

    Attributes:
        text: sources of text, each as `calibration` takes it, or "self": the dense model writes it.
        shares: of the samples, one a source, positive; None: equal shares.
        tokens: to train on, repetitions of the text counted. text_tokens: of the text, without those held out.
        seq_len: tokens of a sample. held_out: samples that are judged by and not trained on.
        seed: of text and order; None: one more than the calibration's, so that the text is another.
        tune: what is trained: "scales" (one scale a unit and the norms' weights, folded), "lora" (low-rank updates of
            all linear layers, merged; norms too) or "full" (all weights).
        rank: of the low-rank updates.
        hard: share of the cross-entropy with the text's own next token in the loss; the rest is the divergence from the
            dense model's predictions.
        rate: the peak learning rate of AdamW. batch: samples a step.
        checks: how many times on the way the held-out divergence is measured. patience: checks in a row without a
            lower one, after which training ends.
        hold: how the dense model is held: "live" (it runs beside the cut one), "8bit" (so, with 8-bit weights) or
            "kept" (it is asked once, and the likeliest tokens of its predictions are kept on the disk).
    """

    text: tuple[str, ...] = (SELF,)
    shares: tuple[float, ...] | None = None
    tokens: int | None = None
    text_tokens: int | None = None
    seq_len: int = 128
    held_out: int = 32
    seed: int | None = None
    tune: str | None = None
    rank: int = 32
    hard: float = 0.0
    rate: float | None = None
    batch: int | None = None
    checks: int = 8
    patience: int = 3
    hold: str | None = None

    def __post_init__(self) -> None:
        for name in ("text", "shares"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, (value,))
            elif isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    def check(self) -> None:
        """Refuse what no model could meet, before one is loaded.

        Raises:
            UsageError: names the field, what was expected and what came.
        """
        if not self.text or not all(isinstance(source, str) and source for source in self.text):
            raise UsageError(f"recover: text: expected names of sources, or {SELF!r}, got {self.text!r}")
        if len(set(self.text)) != len(self.text):
            raise UsageError(f"recover: text: expected each source once, got {self.text!r}")
        if self.shares is not None:
            _check_shares(self.shares, self.text)
        for name, least in (("seq_len", 2), ("held_out", 1), ("rank", 1), ("checks", 1), ("patience", 1)):
            _whole(name, getattr(self, name), least)
        for name, least in (("tokens", 1), ("text_tokens", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least)
        if not (_number(self.hard) and 0.0 <= self.hard <= 1.0):
            raise UsageError(f"recover: hard: expected a share from 0 to 1, got {self.hard!r}")
        if self.rate is not None and not (_number(self.rate) and 0.0 < self.rate < math.inf):
            raise UsageError(f"recover: rate: expected a positive number, got {self.rate!r}")
        for name, choices in (("tune", TUNES), ("hold", HOLDS)):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UsageError(f"recover: {name}: expected one of {', '.join(choices)}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def of(cls, value: Any) -> Recovery | None:
        """A request from what stands for one: itself, sources, what `to_dict` gave; None for None or False.

        Raises:
            UsageError: another type, or an unknown field.
        """
        if value is None or value is False or isinstance(value, cls):
            return value or None
        if isinstance(value, (str, list, tuple)):
            return cls(text=value)  # type: ignore[arg-type]  # made a tuple of
        if value is True:
            return cls()
        if not isinstance(value, Mapping):
            raise UsageError(f"recover: expected sources of text or an object of settings, got {value!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        for name in value:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                raise UsageError(f"recover: unknown setting {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        return cls(**value)

    @property
    def source_shares(self) -> tuple[float, ...]:
        """The share of the samples that comes from each source; they sum to 1."""
        shares: Sequence[float] = self.shares or [1.0] * len(self.text)
        return tuple(share / sum(shares) for share in shares)


def _check_shares(shares: Any, text: Sequence[str]) -> None:
    if len(shares) != len(text) or not all(_number(s) and 0.0 < s < math.inf for s in shares):
        raise UsageError(f"recover: shares: expected a positive number for each of {len(text)} sources, got {shares!r}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"recover: {name}: expected a whole number of at least {least}, got {value!r}")
