"""`recover`: a cut model trained to predict what the dense model predicts, or left as it was."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...arch.facts import count_parameters, fingerprint, weight_bytes
from ...arch.holding import plain_model
from ...engine.memory import free_bytes
from ...errors import HywiaError, UsageError
from ...ops.precision import multiplies_bfloat16
from ...settings import ByDevice
from ..tokens import check_length, check_tokens
from .distilled import Distilled, divergence
from .hooks import Outcome
from .request import Recovery
from .teacher import Kept, Live, Remembered, Teacher, eight_bit
from .text import Text, drawn, given
from .training import trained
from .tuning import has_peft, prepared, training_bytes
from .work import Work, opened

__all__ = ["Dense", "Recovered", "ask", "asked_tokens", "micro_tokens", "recover", "resolved"]

_MANY = 1_000_000  # tokens from which all weights are worth training: on fewer, low-rank updates came nearer
_FULL_PARAMETERS = 3e9  # up to which all weights are trained where memory allows
_SHARE = 0.8  # of the free memory that training may plan with: activations and libraries take the rest
_BRIEF, _LEAST_BRIEF = 0.05, 20  # share of the steps that a plan is tried with, and the fewest that tell something
_READ_OFTEN = 1.5  # times that a text is read, from which it is cheaper to ask the dense model once
_MICRO_TOKENS = ByDevice(cpu=1024, gpu=8192)  # in memory at a time
# Tokens to train on, tokens of text, samples a step: by an H200's rates SmolLM2 is cut and recovered in five minutes,
# all counted; two cores recover it in ten.
_EFFORT = ByDevice(cpu=(98_304, 32_768, 8), gpu=(41_943_040, 10_485_760, 64), large=(16_777_216, 4_194_304, 64))


@dataclass(frozen=True)
class Recovered:
    """What a recovery did.

    Attributes:
        kept: whether the trained weights are in the model; otherwise it is as it was, since training did not bring it
            nearer to the dense model.
        before, after: held-out divergence from the dense model in nats a token; the same where nothing was kept.
        record: JSON-serialisable: the resolved request, text, steps, divergences, seconds.
    """

    kept: bool
    before: float
    after: float
    record: Mapping[str, Any]


def resolved(request: Recovery, dense: Any, device: torch.device, *, seed: int = 0, more: bool = True) -> Recovery:
    """The request with nothing left open, by the dense model's size and the device's free memory.

    Args:
        dense: may be on the meta device. seed: of the calibration. more: a second model is still to come beside it.
    """
    parameters = count_parameters(dense)
    usual, text_tokens, batch = _EFFORT.on(device.type, parameters)
    tokens = request.tokens or usual
    on_meta = next(dense.parameters()).is_meta
    free = _SHARE * free_bytes(device) - (weight_bytes(dense) if on_meta else 0)
    tune, hold = request.tune, request.hold
    if tune is None:
        fits = training_bytes(dense, "full", request.rank) < free and parameters <= _FULL_PARAMETERS
        tune = "full" if fits and (tokens >= _MANY or not has_peft()) else "lora"
    if hold is None:
        left = free - training_bytes(dense, tune, request.rank)
        hold = "live" if not more or weight_bytes(dense) <= left else "kept"
    return replace(
        request,
        tokens=tokens,
        text_tokens=request.text_tokens or min(text_tokens, tokens),
        seed=seed + 1 if request.seed is None else request.seed,
        tune=tune,
        rate=request.rate or usual_rate(tune, parameters, tokens),
        batch=request.batch or batch,
        hold=hold,
    )


def micro_tokens(device: torch.device) -> int:
    """Tokens that are trained on at a time; several such passes make a step where its samples have more."""
    return _MICRO_TOKENS.on(device.type)


def asked_tokens(request: Recovery) -> int:
    """How many tokens the dense model reads in a resolved recovery: of the text, where it is asked once."""
    tokens, text = request.tokens or 0, request.text_tokens or 0
    return min(tokens, text) if request.hold == "kept" or tokens >= _READ_OFTEN * text else tokens


def usual_rate(tune: str, parameters: int, tokens: int) -> float:
    """Peak learning rate of AdamW by what is trained, the dense model's size and the tokens: measured on SmolLM2, of
    135 M, and for larger models along those usual at 7 B (2e-5 for all weights, 2e-4 for low-rank updates)."""
    size = max(parameters / 1.35e8, 1.0)
    if tune == "full":
        return (1.6e-3 if tokens >= _MANY else 4e-4) * size**-0.94
    return (1e-3 if tokens >= _MANY else 2e-3) * size**-0.5 if tune == "lora" else 5e-3


class Dense:
    """The dense model's side of a recovery: text, and what it predicts there.

    Attributes:
        request: resolved. text: to train on and to judge by. text_seconds: until that was there.
    """

    def __init__(
        self, request: Recovery, text: Text, teacher: Teacher, place: Work, began: float, text_seconds: float
    ) -> None:
        self.request, self.text, self.text_seconds = request, text, text_seconds
        self._teacher, self._place, self._began = teacher, place, began

    @property
    def model(self) -> Any | None:
        """The dense model in its own weights, where it is held so."""
        return self._teacher.model if isinstance(self._teacher, Live) and self.request.hold == "live" else None

    @property
    def brief_steps(self) -> int:
        """Steps of `briefly`; 0 where so few would tell nothing."""
        steps = int(_BRIEF * _steps(self.request, self.text))
        return steps if steps >= _LEAST_BRIEF else 0

    def briefly(self, masked: Any) -> None:
        """Train a model whose removed units are zeros for a short while, in place, to tell how well it recovers.

        Zeroed units stay so where all weights or scales are trained: their rows and columns multiply each other's
        gradients. Low-rank updates would bring them back, so scales stand in for those.
        """
        tune = "scales" if self.request.tune == "lora" else self.request.tune
        tokens = self.brief_steps * (self.request.batch or 1) * self.text.train.shape[1]
        rate = self.request.rate if tune == self.request.tune else usual_rate("scales", 1, tokens)
        request = replace(self.request, tune=tune, tokens=tokens, rate=rate, checks=1)
        with opened(None, {}) as place:
            _distilled(masked, self._teacher, request, self.text, place)

    def recover(self, student: Any) -> Recovered:
        """Train a cut model, in place; see the function `recover`."""
        student = plain_model(student, changing=True)
        check_length(student, self.text.train.shape[1], "seq_len")
        for tokens in (self.text.train, self.text.held_out):
            check_tokens(tokens, student)
        if isinstance(self._teacher, Live):
            _check_pair(student, self._teacher.model)
        outcome = _distilled(student, self._teacher, self.request, self.text, self._place)
        before, after = outcome.divergences[0][1], outcome.best
        record = {
            **self.request.to_dict(),
            "text_read": self.text.record,
            "steps": outcome.steps,
            "divergences": [[step, round(value, 6)] for step, value in outcome.divergences],
            "stopped": outcome.stopped,
            "resumed": outcome.resumed,
            "captured": outcome.captured,
            "remembered": outcome.remembered,
            "kept": after < before,
            "text_seconds": round(self.text_seconds, 3),
            "seconds": round(time.monotonic() - self._began, 3),
        }
        return Recovered(after < before, before, min(before, after), record)


@contextmanager
def ask(
    dense: Any,
    tokenizer: Any,
    request: Recovery,
    *,
    tokens: Tensor | None = None,
    work: str | Path | None = None,
    bos: bool | None = None,
    field: str = "text",
    copied: bool = False,
) -> Iterator[Dense]:
    """The dense model's side of a recovery, made before a cut model is there.

    Args:
        request: resolved. tokens, work, bos, field: as for `recover`.
        copied: the model is about to be changed, so a copy stands for it.

    Raises:
        HywiaError, UsageError: as `recover`.
    """
    began = time.monotonic()
    dense = plain_model(dense)
    known = {
        "request": request.to_dict(),
        "dense": fingerprint(dense),
        "text": None if tokens is None else given(tokens, request).record,
    }
    with opened(None if work is None else Path(work), known) as place:
        text = given(tokens, request) if tokens is not None else place.text()
        if text is None:
            text = drawn(dense, tokenizer, request, bos=bos, field=field)
            place.keep_text(text)
        drew = time.monotonic() - began
        check_length(dense, text.train.shape[1], "seq_len")
        for part in (text.train, text.held_out):
            check_tokens(part, dense)
        if request.hold == "kept":
            teacher: Teacher = Kept.made(dense, text, place.predictions)
        elif request.hold == "8bit":
            teacher = Live(eight_bit(dense))
        else:
            teacher = Live(copy.deepcopy(dense) if copied else dense)
        yield Dense(request, text, teacher, place, began, drew)


def recover(
    student: Any,
    teacher: Any,
    tokenizer: Any = None,
    request: Recovery | None = None,
    *,
    tokens: Tensor | None = None,
    work: str | Path | None = None,
    bos: bool | None = None,
    field: str = "text",
) -> Recovered:
    """Train a cut model, in place, to predict what the dense model predicts: the mean over positions of

        (1 − hard) · KL(dense ‖ cut) + hard · cross-entropy with the text,

    both at temperature 1. The held-out divergence is measured before, on the way and after; the weights of its lowest
    value are kept, those of the beginning included, so that the model is never farther from the dense one than before.

    Args:
        student: the cut model. teacher: the dense one, of the same vocabulary; it is not changed.
        tokenizer: for sources of text and for writing; None where `tokens` are given.
        request: None: the defaults.
        tokens: int64 `[samples, length]`, text at hand, instead of the request's sources.
        work: folder for what is needed to go on after a stop: the same call goes on there, and removes it when done.
            None: nothing outlives the call.
        bos, field: as `calibration` takes them.

    Raises:
        UsageError: a request that contradicts itself. HywiaError: models of different vocabularies, text that is too
            short, a missing package. After an error or an interrupt the model's weights are those of the beginning.
    """
    request = request or Recovery()
    request.check()
    _check_pair(plain_model(student, changing=True), plain_model(teacher))
    request = resolved(request, teacher, student.get_input_embeddings().weight.device, more=False)
    with ask(teacher, tokenizer, request, tokens=tokens, work=work, bos=bos, field=field) as dense:
        return dense.recover(student)


def _check_pair(student: Any, teacher: Any) -> None:
    if student is teacher:
        raise UsageError("teacher: expected the dense model, got the cut model itself; load the dense one beside it")
    theirs, ours = (m.get_output_embeddings().weight.shape[0] for m in (teacher, student))
    if theirs != ours:
        raise HywiaError(
            f"teacher: expected a model of the cut model's vocabulary of {ours:,} tokens, got one of {theirs:,}; give "
            "the model that was cut"
        )


def _steps(request: Recovery, text: Text) -> int:
    batch = min(request.batch or 1, len(text.train))
    return max(1, (request.tokens or 0) // (batch * text.train.shape[1]))


def _distilled(student: Any, teacher: Teacher, request: Recovery, text: Text, place: Work) -> Outcome:
    assert request.tune
    assert request.tokens
    assert request.batch
    assert request.rate
    assert request.seed is not None
    device = student.get_input_embeddings().weight.device
    length = text.train.shape[1]
    batch = min(request.batch, len(text.train))
    micro = max(1, min(batch, micro_tokens(device) // length))
    checkpoints = place.checkpoints(fingerprint(student))
    with prepared(student, request.tune, request.rank) as tuned:
        # Norms in float32 between 16-bit matrices work by autocast alone.
        mixed = any(p.dtype != torch.float32 for p in student.parameters())
        autocast = mixed or multiplies_bfloat16(device)
        if isinstance(teacher, Live) and request.tokens >= _READ_OFTEN * text.train.numel():
            teacher = Remembered.made(teacher, text, autocast=autocast) or teacher
        distilled = Distilled(student, tuned, teacher, request.hard, autocast=autocast)
        start = divergence(distilled, text.held_out, device)
        if not math.isfinite(start):
            raise HywiaError(
                f"recover: expected finite predictions of both models, the held-out divergence is {start}; load them "
                "in float32 or bfloat16, and look for damaged weights"
            )
        outcome = trained(
            distilled,
            tuned,
            text,
            work=checkpoints,
            start=start,
            steps=_steps(request, text),
            batch=batch,
            micro=micro,
            rate=request.rate,
            checks=request.checks,
            patience=request.patience,
            seed=request.seed,
            device=device,
        )
        tuned.finish()
    outcome.remembered = isinstance(teacher, Remembered)
    return outcome
