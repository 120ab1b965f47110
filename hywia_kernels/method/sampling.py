"""Text drawn token by token from a model's own distribution: at decode speed where a static driver runs the model.

A token is drawn by inverting the distribution function at a uniform number that depends on the seed, the sample and the
position alone. So a sample does not depend on what is written beside it, and fewer samples are a prefix of more, but
for what other batch sizes change in the last bits of logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch, progress
from ..arch.facts import count_parameters
from ..engine.memory import free_bytes
from ..engine.static_driver import StaticDriver, capture, drivable
from ..errors import HywiaError
from ..ops.precision import multiplies_bfloat16, tensor_float32
from ..settings import ByDevice

__all__ = ["WRITING_SHARE", "Sampler", "batch_of", "driven", "even", "uniforms"]

_BATCH = ByDevice(cpu=128, gpu=4096, large=512)  # sequences at once: about the most that makes a token cheaper
WRITING_SHARE = 0.5  # of the free memory that caches and logits may take; joined matrices take their share before


def uniforms(samples: int, length: int, seed: int) -> Tensor:
    """float32 `[samples, length]` in [0, 1), on the CPU; no generator of torch's own is touched."""
    return torch.rand(samples, length, generator=torch.Generator().manual_seed(seed), device="cpu")


class Sampler:
    """Draws from a distribution restricted to some tokens.

    Args:
        ordinary: ids that may be drawn. vocabulary: logits of a position. device: of the logits.
    """

    def __init__(self, ordinary: list[int], vocabulary: int, device: torch.device) -> None:
        barred = torch.ones(vocabulary, dtype=torch.bool)
        barred[torch.tensor([i for i in ordinary if i < vocabulary], device="cpu")] = False
        self._barred = barred.to(device)
        self.failed = torch.zeros((), dtype=torch.bool, device=device)  # logits were NaN or infinite somewhere

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """int64 `[batch]`, of logits `[batch, vocabulary]` at temperature 1 and float32 `[batch]` in [0, 1)."""
        logits = logits.float().masked_fill(self._barred, -torch.inf)
        largest = logits.amax(-1, keepdim=True)
        self.failed |= ~largest.isfinite().all()
        upto = torch.exp(logits - largest).cumsum(-1)
        # Barred tokens add nothing, and the first sum *above* the number is never theirs.
        drawn = torch.searchsorted(upto, uniform[:, None] * upto[:, -1:], right=True)[:, 0]
        return drawn.clamp(max=logits.shape[-1] - 1)

    def check(self) -> None:
        """Raise HywiaError if any logits so far were NaN or infinite."""
        if bool(self.failed):
            raise HywiaError("model: its logits are NaN or infinite; load it in float32 or bfloat16")


def batch_of(model: Any, samples: int, length: int) -> int:
    """Sequences that are written at once: what is fast, fits with caches and logits, and leaves no small batch over."""
    config, weight = arch.text_config(model), model.get_input_embeddings().weight
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * arch.head_dim(model) * length * weight.element_size()
    logits = 4 * 4 * weight.shape[0]
    fits = int(WRITING_SHARE * free_bytes(weight.device) / (cache + logits))
    return min(even(samples, weight.device.type, count_parameters(model)), max(1, fits))


def even(samples: int, device_type: str, parameters: int) -> int:
    """Samples of a batch, where all are alike and about as large as is fast on a "cpu", "cuda" or other device for a
    model of so many parameters."""
    return -(-samples // max(1, round(samples / _BATCH.on(device_type, parameters))))


def driven(model: Any, starts: Tensor, uniform: Tensor, ordinary: list[int], batch: int) -> Tensor | None:
    """Samples int64 `[samples, length]`, on the CPU, that begin with `starts` `[samples, begin]`; None where no driver
    runs this model to the same logits. Where bfloat16 is multiplied faster, a float32 model writes through a copy in
    it, or, where no memory is left for one, on CUDA with TF32 products.

    Args:
        uniform: float32 `[samples, length]`; what is at a position draws its token. ordinary: ids that may be drawn.
    """
    length = uniform.shape[1]
    if drivable(model, length, join=None) is not None:
        return None
    model = _sixteen_bits(model)
    weight = model.lm_head.weight
    driver = StaticDriver(model, batch, length, compile=False, join=None)
    sampler = Sampler(ordinary, weight.shape[0], weight.device)
    writer = _Writer(driver, sampler, batch, length, starts.shape[1])
    step: Callable[[], Any] = writer.step
    if weight.is_cuda:
        writer.begin(starts[:batch], uniform[:batch])
        with tensor_float32():
            step = capture(writer.step)
    written = []
    with progress.Bar("writing text", len(starts)) as bar:
        for first in range(0, len(starts), batch):
            count = len(starts[first : first + batch])
            writer.begin(starts[first : first + batch], uniform[first : first + batch])
            for _ in range(length - 1):
                step()
            written.append(writer.tokens[:count].cpu().clone())
            bar.step(count)
    sampler.check()
    return torch.cat(written)


def _sixteen_bits(model: Any) -> Any:
    """A copy of a float32 model with weights in bfloat16, where that is multiplied faster and the copy fits; others as
    they are. Half the bytes are twice the speed, and what is drawn at random is as much the model's own."""
    weights = [p for p in model.parameters() if p.dtype == torch.float32]
    device = model.lm_head.weight.device
    size = sum(2 * p.numel() for p in weights)
    if (
        not multiplies_bfloat16(device)
        or len(weights) < len(list(model.parameters()))
        or size > WRITING_SHARE * free_bytes(device)
    ):
        return model
    # Buffers, those of the rotary embedding among them, stay in float32.
    halved = {id(p): nn.Parameter(p.detach().to(torch.bfloat16), requires_grad=False) for p in weights}
    return copy.deepcopy(model, halved)


class _Writer:
    """The state of a batch that is being written, all of it on the device, so that a step can be replayed."""

    def __init__(self, driver: StaticDriver, sampler: Sampler, batch: int, length: int, begin: int) -> None:
        self.driver, self.sampler, self.given = driver, sampler, begin
        device = driver.device
        self.tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(batch, length, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def begin(self, starts: Tensor, uniform: Tensor) -> None:
        """A new batch; where it is smaller, the last rows are written again and left out."""
        count = len(starts)
        self.tokens.zero_()
        self.tokens[:count, : self.given] = starts.to(self.tokens.device)
        self.uniform[:count] = uniform.to(self.uniform.device)
        self.position.zero_()

    @torch.no_grad()
    def step(self) -> Tensor:
        """Read the token at the position, and write the next one where the sample's beginning does not give it."""
        logits = self.driver.step(self.tokens.index_select(1, self.position), self.position)
        following = self.position + 1
        drawn = self.sampler.draw(logits, self.uniform.index_select(1, following)[:, 0])[:, None]
        known = self.tokens.index_select(1, following)
        self.tokens.index_copy_(1, following, torch.where(following < self.given, known, drawn))
        self.position.copy_(following)
        return self.tokens
