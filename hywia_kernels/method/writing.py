"""Text that a model writes: sampled for calibration, greedy to be read. Its generation config has no say in either."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import progress
from ..errors import HywiaError, UsageError
from .sampling import Sampler, batch_of, driven, uniforms
from .tokens import check_length, check_tokens, encode, positions, prefix

_OTHERWISE = 8  # of so many written samples one begins as texts do not usually begin

__all__ = ["continuation", "evaluating", "greedy", "prompt_tokens", "self_written"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode within the context; afterwards every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            vars(module)["training"] = False
        yield
    finally:
        for module in training:
            vars(module)["training"] = True


@contextmanager
def _without_generation_config(model: Any) -> Iterator[None]:
    """Set the model's generation config aside within the context.

    `generate` would take every setting from it that the caller leaves open: end tokens, penalties, filters, beams, a
    cache, an assistant.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        with evaluating(model):
            yield
    finally:
        model.generation_config = own


def _ends(model: Any) -> set[int]:
    """Ids that end a text by the model's configs; not all of them are special to every tokenizer."""
    ids: set[int] = set()
    for config in (model.generation_config, model.config):
        ends = getattr(config, "eos_token_id", None)
        if isinstance(ends, Tensor):
            ends = ends.flatten().tolist()
        ids.update(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
    return ids


def _ordinary(model: Any, tokenizer: Any) -> list[int]:
    """Ids, ascending, that are text: known to tokenizer and model, not special, and no end of a text."""
    known = set(tokenizer.get_vocab().values())
    special = set(tokenizer.all_special_ids) | _ends(model)
    most = min(model.get_input_embeddings().num_embeddings, len(tokenizer))
    ordinary = [i for i in range(most) if i in known and i not in special]
    if not ordinary:
        raise HywiaError(
            "tokenizer: expected ordinary tokens for the model to write, got special ones alone; give calibration text"
        )
    return ordinary


def _drawing(sampler: Sampler, uniform: Tensor) -> Any:
    """A logits processor after which the likeliest token is the one that `Sampler` draws.

    Args:
        uniform: float32 `[batch, length]`, on the logits' device; what is at a position draws its token.
    """
    from transformers import LogitsProcessor

    class Drawing(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            drawn = sampler.draw(scores, uniform[:, input_ids.shape[1]])
            sampler.check()
            return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)

    return Drawing()


def _generate(model: Any, ids: Tensor, **settings: Any) -> Tensor:
    from transformers import GenerationConfig, LogitsProcessorList

    processors = settings.pop("processors", [])
    with _without_generation_config(model), torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(**settings),
            logits_processor=LogitsProcessorList(processors),
        )


def _opening(tokenizer: Any, bos: bool | None) -> list[int]:
    """The ids that a sample is written behind: those of `prefix`, or the beginning-of-text token where there is one."""
    return prefix(tokenizer, bos if tokenizer.bos_token_id is None or bos is False else True)


def _kept(tokenizer: Any, samples: int, bos: bool | None) -> Tensor:
    """bool `[samples]`, on the CPU: whether a sample keeps what it was written behind."""
    usual = bool(prefix(tokenizer, bos)) or not _opening(tokenizer, bos)
    kept = torch.full((samples,), usual, device="cpu")
    if bos is None and _opening(tokenizer, bos):
        kept[_OTHERWISE - 1 :: _OTHERWISE] = not usual
    return kept


def self_written(
    model: Any,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    batch: int | None = None,
    bos: bool | None = None,
) -> Tensor:
    """Text the model writes itself, int64 `[samples, seq_len]`, on the CPU: no data is needed.

    Each sample is written behind the beginning-of-text token (if there is one, whether or not the tokenizer adds it)
    and one random ordinary token, and sampled at temperature 1 from the ordinary tokens, without an end (see
    `sampling`). The model's generation config has no influence, but that its end tokens count as special. The idea of
    data-free calibration from the model's own generations is LLM-QAT's (arXiv 2305.17888).

    A sample then begins as the tokenizer begins a text, with the token or without, and one in eight the other way: of
    chat, say, or of the middle of a document. Models gather attention on the first token, whichever it is; one that was
    cut and repaired on a single first token does so for that one alone. With `bos` all samples begin alike.

    Raises:
        UsageError: `bos=True` without such a token, or a `seq_len` that has no room beside it, or beyond the model's
            positions. HywiaError: logits that are NaN or infinite, or a tokenizer of special tokens alone.
    """
    begin, kept = _opening(tokenizer, bos), _kept(tokenizer, samples, bos)
    length, most = seq_len + (len(begin) if bos is None else 0), positions(model)
    if most is not None and length > most >= seq_len:  # no position for what is left out afterwards
        begin, kept, length = prefix(tokenizer, bos), torch.ones_like(kept), seq_len
    if seq_len <= len(begin):
        raise UsageError(f"seq_len: expected at least {len(begin) + 1}, got {seq_len}")
    check_length(model, seq_len)
    ordinary = _ordinary(model, tokenizer)
    rng = random.Random(seed)
    starts = torch.tensor([[*begin, rng.choice(ordinary)] for _ in range(samples)], dtype=torch.int64, device="cpu")
    check_tokens(starts, model)
    written = _written(model, starts, uniforms(samples, length, seed), ordinary, batch)
    return torch.where(kept[:, None], written[:, :seq_len], written[:, length - seq_len :])


def _written(model: Any, starts: Tensor, uniform: Tensor, ordinary: list[int], batch: int | None) -> Tensor:
    """int64 `[samples, length]` that begins with `starts`, by the fastest way that the model allows."""
    samples, length = uniform.shape
    if starts.shape[1] >= length:
        return starts[:, :length]
    device = model.get_input_embeddings().weight.device
    batch = batch_of(model, samples, length) if batch is None else min(batch, samples)
    with evaluating(model):
        result = driven(model, starts, uniform, ordinary, batch)
    if result is None:
        result = _generated(model, starts, uniform.to(device), ordinary, batch)
    rest = result[:, starts.shape[1] :]
    if result.shape != (samples, length) or not bool(torch.isin(rest, torch.tensor(ordinary, device="cpu")).all()):
        raise HywiaError(
            f"model: expected it to write {samples} samples of {length} ordinary tokens, got {tuple(result.shape)} or "
            "tokens that are none; its `generate` is not transformers' own: give calibration text"
        )
    return result


def _generated(model: Any, starts: Tensor, uniform: Tensor, ordinary: list[int], batch: int) -> Tensor:
    """What `sampling.driven` gives, by the model's own `generate`."""
    written = []
    sampler: Sampler | None = None
    for chunk, numbers in zip(progress.track(starts.split(batch), "writing text"), uniform.split(batch), strict=True):
        if sampler is None:
            sampler = Sampler(ordinary, _outputs(model), uniform.device)
        tokens = _generate(
            model,
            chunk.to(uniform.device),
            do_sample=False,
            max_length=uniform.shape[1],
            pad_token_id=0,
            processors=[_drawing(sampler, numbers)],
        )
        written.append(tokens.cpu())
    return torch.cat(written)


def _outputs(model: Any) -> int:
    """How many logits a position has."""
    return model.get_output_embeddings().weight.shape[0]


def greedy(model: Any, ids: Tensor, new: int) -> Tensor:
    """Ids int64 `[batch, length]` continued greedily by `new` tokens of any kind: int64 `[batch, length + new]`."""
    return _generate(model, ids, do_sample=False, max_new_tokens=new, pad_token_id=0)


def prompt_tokens(model: Any, tokenizer: Any, prompt: str, bos: bool | None = None) -> Tensor:
    """int64 `[1, length]` of a prompt, on the CPU.

    Raises:
        UsageError: no token, or no position left to continue at. HywiaError: an id outside the model's vocabulary.
    """
    ids = [*prefix(tokenizer, bos), *encode(tokenizer, prompt, "prompt")]
    if not ids:
        raise UsageError("prompt: expected at least one token, got none")
    check_length(model, len(ids) + 1, "prompt")
    tokens = torch.tensor([ids], dtype=torch.int64, device="cpu")
    check_tokens(tokens, model)
    return tokens


def continuation(model: Any, tokenizer: Any, prompt: str, new: int = 40, *, bos: bool | None = None) -> str:
    """Greedy continuation of a prompt, the prompt left out: `new` tokens, fewer where the tokenizer's end-of-text token
    comes or the model's positions end.

    Raises:
        UsageError: a prompt of no token, or one that fills all positions.
    """
    ids = prompt_tokens(model, tokenizer, prompt, bos)
    most = positions(model)
    new = new if most is None else min(new, most - ids.shape[1])
    device = model.get_input_embeddings().weight.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    output = _generate(
        model,
        ids.to(device),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
