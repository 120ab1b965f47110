"""What is done to a cut model before it is judged: nothing, this package's recovery, or LLM-Pruner's own.

`none`; `lp-own`, see `alpaca`; or sources of text for `hywia_kernels.recover`, several joined by `+`: `self` (the dense
model writes it), a file or a data set. A source's text is drawn once for a calibration seed, so that all criteria of
the seed are recovered on the same text, and judged on the same samples held out of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import hywia_kernels as hk
from hywia_kernels.method.recovery.job import resolved
from hywia_kernels.method.recovery.teacher import Live
from hywia_kernels.method.recovery.text import Text, drawn, given
from hywia_kernels.method.recovery.training import Distilled, divergence
from hywia_kernels.method.recovery.tuning import Tuned

from . import alpaca
from .memory import spending

NONE, LP_OWN = "none", "lp-own"
# `recovery` is empty in rows of before it was; seconds of drawing the text (once a seed) and of the recovery itself;
# `divergence` in nats a token from the dense model, on text held out of the first source that the run asked for.
COLUMNS = {
    "recovery": str,
    "tokens_trained": int,
    "text_seconds": float,
    "recovery_seconds": float,
    "divergence": float,
}


@dataclass(frozen=True)
class Recovered:
    """A model after one recovery.

    Attributes:
        figures: its `COLUMNS`.
        peak_bytes: most memory while it ran, what else was there included; None where it is not known, or nothing ran.
    """

    model: Any
    figures: dict[str, Any]
    peak_bytes: int | None


class Recoveries:
    """The recoveries of one dense model.

    Args:
        dense: the model that was cut. tokenizer: None where text is `written`.
        names: which are wanted. request: for this package's, its sources left out.
        rows: Alpaca's, for `lp-own`.
        written: gives text of a resolved request, int64 `[samples, length]`, in place of its sources.

    Raises:
        SystemExit: `lp-own` without rows or tokenizer.
    """

    def __init__(
        self,
        dense: Any,
        tokenizer: Any,
        names: Sequence[str],
        request: hk.Recovery,
        *,
        rows: Sequence[Any] = (),
        written: Callable[[hk.Recovery], Tensor] | None = None,
    ) -> None:
        if LP_OWN in names and (not rows or tokenizer is None):
            raise SystemExit(f"--recover: {LP_OWN} needs a tokenizer and --alpaca FILE")
        self.dense, self.tokenizer, self.names, self.rows = dense, tokenizer, list(names), rows
        self._written = written
        self.device: torch.device = dense.get_input_embeddings().weight.device
        self._texts: dict[tuple[str, int], tuple[Text, float]] = {}
        self._requests: dict[str, hk.Recovery] = {}
        for name in (n for n in names if n not in (NONE, LP_OWN)):
            asked = replace(request, text=tuple(name.split("+")))
            asked.check()
            self._requests[name] = resolved(asked, dense, self.device)  # once: it looks at the memory that is free

    def text(self, name: str, seed: int) -> tuple[Text, float]:
        """The text of a source for a calibration seed, and the seconds that it took."""
        key = (name, seed)
        if key not in self._texts:
            request = self.resolved(name, seed)
            with spending(self.device) as spent:
                if self._written is not None:
                    text = given(self._written(request), request)
                else:
                    text = drawn(self.dense, self.tokenizer, request)
            self._texts[key] = (text, spent.seconds)
        return self._texts[key]

    def resolved(self, name: str, seed: int) -> hk.Recovery:
        """This package's request with nothing left open; its text is another one than that of the calibration."""
        return replace(self._requests[name], seed=seed + 1)

    def held_out(self, seed: int) -> Tensor | None:
        """The samples that all models of a seed are judged on; None where no recovery that reads text is wanted."""
        source = next((name for name in self.names if name not in (NONE, LP_OWN)), None)
        return None if source is None else self.text(source, seed)[0].held_out

    def each(self, cut: Any, seed: int) -> Iterator[Recovered]:
        """The cut model after each of the recoveries. The last one works on the model itself, the others on copies."""
        for name in self.names:
            copied = name not in (NONE, self.names[-1])
            yield self._recovered(copy.deepcopy(cut) if copied else cut, name, seed)

    def _recovered(self, model: Any, name: str, seed: int) -> Recovered:
        figures: dict[str, Any] = {"recovery": name}
        held_out = self.held_out(seed)
        peak_bytes = None
        if name != NONE:
            drawn_in = None if name == LP_OWN else self.text(name, seed)[1]
            with spending(self.device) as spent:
                tokens = self._own(model, seed) if name == LP_OWN else self._distilled(model, name, seed)
            peak_bytes = spent.peak_bytes
            figures |= {"tokens_trained": tokens, "text_seconds": drawn_in, "recovery_seconds": spent.seconds}
        if held_out is not None:
            figures["divergence"] = apart(model, self.dense, held_out)
        return Recovered(model, figures, peak_bytes)

    def _own(self, model: Any, seed: int) -> int:
        return alpaca.recover(model, self.tokenizer, self.rows, seed=seed).tokens

    def _distilled(self, model: Any, name: str, seed: int) -> int:
        """Recover on the text of the seed; tokens trained on, repetitions counted."""
        text, request = self.text(name, seed)[0], self.resolved(name, seed)
        tokens = torch.cat([text.train, text.held_out])
        request = replace(request, held_out=len(text.held_out))
        record = hk.recover(model, self.dense, None, request, tokens=tokens).record
        return int(record["steps"]) * min(int(record["batch"]), len(text.train)) * text.train.shape[1]


@torch.no_grad()
def apart(model: Any, dense: Any, held_out: Tensor) -> float:
    """Mean divergence in nats a token of a model's predictions from the dense model's on int64 `[samples, length]`, in
    the models' own dtype."""
    pair = Distilled(model, Tuned({}, {}, lambda: None), Live(dense), 0.0, autocast=False)
    return divergence(pair, held_out, dense.get_input_embeddings().weight.device)
