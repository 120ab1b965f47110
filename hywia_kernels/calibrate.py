"""Statistics from one forward and one backward of plain autograd.

The decoder's linear layers get a custom backward: the input gradient as usual, and, instead of a weight gradient left
in `.grad`, per-sample gradients of this one matrix that are scored and freed before the next matrix's turn. At any
time one matrix has a gradient and a square accumulator; nothing else in the model asks for gradients. The loss is
computed a few samples at a time, so the logits of the whole set never exist together.

This is the reference engine, and the one for CPUs; a faster one takes its place behind `calibrate`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from . import arch, ops, progress
from .errors import HywiaError, UsageError
from .ops.checks import ORDERS
from .text import check_tokens, digest
from .types import Group, Statistics
from .versions import versions
from .weights import check_finite, count_parameters, fingerprint

__all__ = ["calibrate"]

# Powers of two, so that scaling and unscaling are exact. float16 activations' gradients underflow without one: a mean
# over a thousand tokens puts them near 1e-7, below float16's normal range.
_FLOAT16_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)
_LOSS_TOKENS = 2048  # tokens whose logits exist at a time
_IGNORED = -100


class _NotFinite(Exception):
    """A gradient overflowed or is NaN at `module`."""

    def __init__(self, module: str) -> None:
        super().__init__(module)
        self.module = module


@dataclass
class _Accumulator:
    """One group's results while its matrices arrive, on the matrices' device."""

    fine: dict[str, tuple[Tensor, Tensor]]
    coarse: Tensor

    @classmethod
    def empty(cls, group: Group, samples: int, device: torch.device) -> _Accumulator:
        def vector() -> Tensor:
            return torch.zeros(group.units, dtype=torch.float32, device=device)

        return cls(
            {order: (vector(), vector()) for order in ORDERS},
            torch.zeros((len(group.members), samples, group.units), dtype=torch.float32, device=device),
        )


class _Sink:
    """Scores one matrix when its output gradient arrives."""

    def __init__(self, group: Group, index: int, into: _Accumulator, scale: float, backend: str | None, bar) -> None:
        self.group, self.index, self.into, self.scale, self.backend, self.bar = group, index, into, scale, backend, bar

    def __call__(self, weight: Tensor, grad_output: Tensor, inputs: Tensor) -> None:
        member = self.group.members[self.index]
        coarse = self.into.coarse[self.index]
        mean = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        fisher = torch.zeros_like(mean)
        gradient = torch.empty_like(mean)
        samples = grad_output.shape[0]
        for s in range(samples):
            torch.mm(grad_output[s].float().t(), inputs[s].float(), out=gradient)
            gradient /= self.scale
            signed = ops.taylor_importance(
                weight, gradient, axis=member.axis, group_size=member.group_size, backend=self.backend
            ).signed
            coarse[s].copy_(signed)
            mean += gradient
            fisher.addcmul_(gradient, gradient)
        mean /= samples
        fisher /= samples
        for order, pair in self.into.fine.items():
            ops.taylor_importance(
                weight,
                mean,
                fisher,
                axis=member.axis,
                order=order,
                group_size=member.group_size,
                out=pair,
                backend=self.backend,
            )
        # NaN and Inf survive every sum above, so the results tell for the gradients. `fine` may hold other members'.
        totals = torch.stack([coarse.sum(), *(fine.sum() for fine, _ in self.into.fine.values())])
        if not bool(torch.isfinite(totals).all()):
            raise _NotFinite(member.module)
        self.bar.step()


class _ScoredLinear(torch.autograd.Function):
    """`functional.linear` whose backward hands (weight, grad_output, input) to a sink instead of making a weight
    gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, sink: _Sink) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.sink = sink
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_output,) = grads
        inputs, weight = ctx.saved_tensors
        ctx.sink(weight, grad_output, inputs)
        return grad_output @ weight, None, None, None


@contextmanager
def _forward_replaced(replacements: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Give modules another `forward` for a while."""
    before = [(module, module.__dict__.get("forward")) for module, _ in replacements]
    try:
        for module, forward in replacements:
            module.forward = forward
        yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients; both restored."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(training)


def _padded(batches: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`(tokens [samples, longest], lengths [samples])`; right padding is harmless under a causal mask."""
    rows: list[Tensor] = []
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        if not isinstance(batch, Tensor) or batch.dim() not in (1, 2) or batch.is_floating_point():
            raise UsageError("batches: expected int64 token ids [samples, length], or a sequence of such")
        rows += list(batch.cpu().long().reshape(-1, batch.shape[-1]))
    if not rows:
        raise UsageError("batches: expected at least one sample, got none")
    lengths = torch.tensor([r.numel() for r in rows])
    if int(lengths.min()) < 2:
        raise UsageError("batches: expected samples of at least 2 tokens (a next-token loss needs two)")
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def _hidden_gradient(model: Any, hidden: Tensor, tokens: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, float]:
    """Gradient of `scale · Σ_s L_s` with respect to the final hidden states, and the mean loss."""
    head = model.get_output_embeddings()
    gradient = torch.empty_like(hidden)
    total = 0.0
    labels = tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], _IGNORED)[:, 1:]
    step = max(1, _LOSS_TOKENS // tokens.shape[1])
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        states = hidden[part].detach().requires_grad_()
        with torch.enable_grad():
            logits = head(states[:, :-1]).float()
            target = labels[part].to(logits.device)
            loss = functional.cross_entropy(logits.transpose(1, 2), target, ignore_index=_IGNORED, reduction="none")
            per_sample = loss.sum(1) / (lengths[part].to(loss.device) - 1)
            (gradient[part],) = torch.autograd.grad(per_sample.sum() * scale, states)
        total += float(per_sample.detach().sum())
    return gradient, total / len(tokens)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _activation_bytes(found: Sequence[Group], model: nn.Module, tokens: int) -> int:
    """Roughly what backward keeps: inputs and outputs of every scored matrix, and as much again between them."""
    per_token = 0
    for group in found:
        for member in group.members:
            per_token += 2 * sum(model.get_submodule(member.module).weight.shape)  # type: ignore[arg-type]
    return tokens * per_token * next(model.parameters()).element_size()


def _run(
    model: Any, found: Sequence[Group], tokens: Tensor, lengths: Tensor, scale: float, backend: str | None
) -> tuple[dict[str, _Accumulator], float, bool]:
    """One forward and one backward; `(accumulators by group, mean loss, whether layers were checkpointed)`."""
    accumulators: dict[str, _Accumulator] = {}
    replacements: list[tuple[nn.Module, Any]] = []
    device = model.get_input_embeddings().weight.device
    lean = _activation_bytes(found, model, tokens.numel()) > _free_bytes(device) // 2
    with progress.Bar("scoring", sum(len(g.members) for g in found)) as bar:
        for group in found:
            linears = [model.get_submodule(m.module) for m in group.members]
            into = accumulators[group.name] = _Accumulator.empty(group, len(tokens), linears[0].weight.device)
            for index, linear in enumerate(linears):
                sink = _Sink(group, index, into, scale, backend, bar)
                replacements.append((linear, _scored_forward(linear, sink)))
        if lean:
            layers = model.get_submodule(arch.architecture(model).layers)
            replacements += [(layer, _checkpointed_forward(layer)) for layer in layers]
        with _forward_replaced(replacements), torch.enable_grad():
            embedded = model.get_input_embeddings()(tokens.to(device)).detach().requires_grad_()
            hidden = model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state
            gradient, loss = _hidden_gradient(model, hidden, tokens, lengths, scale)
            hidden.backward(gradient)
    return accumulators, loss, lean


def _scored_forward(linear: Any, sink: _Sink):
    return lambda inputs: _ScoredLinear.apply(inputs, linear.weight, linear.bias, sink)


def _checkpointed_forward(layer: Any):
    forward = layer.forward
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def calibrate(model: Any, batches: Tensor | Sequence[Tensor], *, backend: str | None = None) -> Statistics:
    """Fine and per-sample coarse statistics of every unit of a model.

    With `L_s` the mean next-token loss of sample `s`, `G_s = dL_s/dW`, `G = mean_s G_s`, `F = mean_s G_s²`: fine sums
    of `|G·w|`, `½·F·w²` and `|G·w − ½·F·w²|` over each unit, and `h_s = Σ G_s·w` over each unit's part of each matrix.
    Gradients are float32 sums whatever the weights' dtype; float16 models run with an exact power-of-two loss scale.

    Args:
        model: a causal language model of a known architecture, on any device; left as it was, `.grad` untouched.
        batches: token ids int64 `[samples, length]`, or a sequence of such or of single `[length]` samples.
        backend: of the ops.

    Returns:
        Statistics, on the CPU.

    Raises:
        HywiaError: unknown architecture, ids beyond the vocabulary, or NaN or Inf in weights or gradients (named by
            module). UsageError: malformed batches.
    """
    began = time.monotonic()
    found = arch.groups(model)
    tokens, lengths = _padded(batches)
    check_tokens(tokens, model.get_input_embeddings().num_embeddings)
    check_finite(model)
    scales = _FLOAT16_SCALES if any(p.dtype == torch.float16 for p in model.parameters()) else (1.0,)
    overflowed = ""
    with _frozen(model):
        for scale in scales:
            try:
                accumulators, loss, lean = _run(model, found, tokens, lengths, scale, backend)
                break
            except _NotFinite as error:
                overflowed = error.module
        else:
            raise HywiaError(
                f"{overflowed}: expected finite gradients, got NaN or Inf; load the model in float32 or bfloat16, "
                "and look for calibration text that gives an infinite loss"
            )
    weight = model.get_submodule(found[0].members[0].module).weight
    record = {
        "samples": len(tokens),
        "seq_len": int(lengths.max()),
        "calibration_sha256": digest(tokens),
        "loss": loss,
        "backend": ops.choose("taylor_importance", backend, weight, weight.new_empty(0, dtype=torch.float32)),
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "loss_scale": scale,
        "checkpointed": lean,
        "seconds": round(time.monotonic() - began, 3),
        "versions": versions(),
    }
    return Statistics(
        groups=found,
        fine={n: {o: pair[0].cpu() for o, pair in a.fine.items()} for n, a in accumulators.items()},
        coarse={n: a.coarse.cpu() for n, a in accumulators.items()},
        parameters=count_parameters(model),
        fingerprint=fingerprint(model),
        record=record,
    )
