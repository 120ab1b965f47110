"""The dense model's predictions: of a model that runs beside the cut one, that ran there once, or kept on the disk."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn

from ... import arch, progress
from ...arch.views import is_transposed
from ...engine.memory import free_bytes
from ...settings import ByDevice
from ..distillation import HeadTargets, TopTargets, top_targets
from .text import Text

__all__ = ["KEPT_TOKENS", "Kept", "Live", "Remembered", "Teacher", "eight_bit", "kept_bytes"]

KEPT_TOKENS = 64  # likeliest tokens of each prediction that are kept; the rest counts as one outcome
# Tokens that the dense model reads at a time when it is asked once: a GPU needs many to hide what launches its kernels.
_BATCH_TOKENS = ByDevice(cpu=4096, gpu=32_768)
_SHARE = 0.25  # of the free memory that remembered hidden states may take


class Teacher(Protocol):
    """Gives targets of all positions but the last of samples, flattened."""

    def targets(self, tokens: Tensor, index: Tensor, *, held_out: bool) -> HeadTargets | TopTargets:
        """Of samples int64 `[samples, length]`, which are those at `index` of the text to train on, or held out."""
        ...


class Live:
    """A dense model that runs beside the cut one."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def targets(self, tokens: Tensor, index: Tensor, *, held_out: bool) -> HeadTargets:
        device = self.model.get_input_embeddings().weight.device
        hidden = arch.decoder(self.model)(tokens.to(device), use_cache=False).last_hidden_state[:, :-1]
        return HeadTargets(self.model, hidden.reshape(-1, hidden.shape[-1]))


class Remembered:
    """A dense model that was asked once: its final hidden states on a text, from which its head makes the predictions
    that it would make again.

    Args:
        model: the dense one, of which only the head runs. states: `[samples, length - 1, features]` of the text to
            train on, and of what is held out, each on the model's device or on the host.
    """

    def __init__(self, model: Any, train: Tensor, held_out: Tensor) -> None:
        self.model = model
        self._states = {False: train, True: held_out}

    @property
    def at_hand(self) -> bool:
        """Whether all of it is on the device of the head, so that no copy from the host is in the way of a graph."""
        device = self.model.get_output_embeddings().weight.device
        return all(states.device == device for states in self._states.values())

    @classmethod
    @torch.no_grad()
    def made(cls, live: Live, text: Text, *, autocast: bool) -> Remembered | None:
        """Ask a model once for all of a text; None where no memory has room for what it says.

        Args:
            autocast: products are made in bfloat16, as those of the head will be: hidden states are kept so.
        """
        model = live.model
        head = model.get_output_embeddings().weight
        device, dtype = head.device, torch.bfloat16 if autocast else head.dtype
        places = [device] if device.type == "cpu" else [device, torch.device("cpu")]
        tokens = sum(x.shape[0] * (x.shape[1] - 1) for x in (text.train, text.held_out))
        needed = tokens * head.shape[1] * dtype.itemsize
        place = next((p for p in places if needed <= _SHARE * free_bytes(p)), None)
        if place is None:
            return None
        asked = []
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            for samples in (text.train, text.held_out):
                states = torch.empty(len(samples), samples.shape[1] - 1, head.shape[1], dtype=dtype, device=place)
                step = max(1, _BATCH_TOKENS.on(device.type) // samples.shape[1])
                for start in progress.track(range(0, len(samples), step), "asking the dense model"):
                    batch = samples[start : start + step]
                    hidden = live.targets(batch, torch.arange(len(batch)), held_out=False).hidden
                    states[start : start + step] = hidden.view(len(batch), -1, hidden.shape[-1])
                asked.append(states)
        return cls(model, *asked)

    def targets(self, tokens: Tensor, index: Tensor, *, held_out: bool) -> HeadTargets:
        states = self._states[held_out]
        return HeadTargets(self.model, states.index_select(0, index.to(states.device)).to(tokens.device).flatten(0, 1))


class Kept:
    """Predictions of a dense model on a text, on the disk: token ids, log-probabilities in float16, and the log of
    what is left for all other tokens."""

    def __init__(self, folder: Path) -> None:
        self._files = {
            (part, what): numpy.load(folder / f"{part}-{what}.npy", mmap_mode="r")
            for part in ("train", "held_out")
            for what in ("indices", "log_probabilities", "rest")
        }

    @classmethod
    def made(cls, model: Any, text: Text, folder: Path) -> Kept:
        """Ask a model once, and keep what it says in a folder; predictions that are there already stay."""
        folder.mkdir(parents=True, exist_ok=True)
        done = folder / "complete"
        if not done.exists():
            for part, tokens in (("train", text.train), ("held_out", text.held_out)):
                _keep(model, tokens, folder, part)
            done.touch()
        return cls(folder)

    def targets(self, tokens: Tensor, index: Tensor, *, held_out: bool) -> TopTargets:
        part, rows = "held_out" if held_out else "train", index.cpu().numpy()
        values = [
            torch.from_numpy(numpy.ascontiguousarray(self._files[part, what][rows])).to(tokens.device).flatten(0, 1)
            for what in ("indices", "log_probabilities", "rest")
        ]
        indices, log_probabilities, rest = values
        return TopTargets(indices, log_probabilities, rest.float())


def _keep(model: Any, tokens: Tensor, folder: Path, part: str) -> None:
    length = tokens.shape[1] - 1
    shapes = {
        "indices": ((len(tokens), length, KEPT_TOKENS), "int32"),
        "log_probabilities": ((len(tokens), length, KEPT_TOKENS), "float16"),
        "rest": ((len(tokens), length), "float16"),
    }
    vocabulary = model.get_output_embeddings().weight.shape[0]
    kept = min(KEPT_TOKENS, vocabulary)
    files = {
        what: numpy.lib.format.open_memmap(
            folder / f"{part}-{what}.npy", "w+", dtype, shape if len(shape) == 2 else (*shape[:2], kept)
        )
        for what, (shape, dtype) in shapes.items()
    }
    live = Live(model)
    step = max(1, _BATCH_TOKENS.cpu // tokens.shape[1])
    for start in progress.track(range(0, len(tokens), step), "asking the dense model"):
        batch = tokens[start : start + step]
        top = top_targets(model, live.targets(batch, torch.arange(len(batch)), held_out=False).hidden, kept)
        for what, file in files.items():
            file[start : start + step] = getattr(top, what).cpu().numpy().reshape(file[start : start + step].shape)
    for file in files.values():
        file.flush()


def kept_bytes(samples: int, seq_len: int) -> int:
    """Bytes on the disk of predictions that are kept."""
    return samples * (seq_len - 1) * (6 * KEPT_TOKENS + 2)


class _EightBit(nn.Module):
    """A linear layer whose weight is held in int8, a scale for each output, and multiplied in the input's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scale = weight.detach().float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127.0
        self.register_buffer("scale", scale.to(weight.dtype))
        self.register_buffer("values", (weight.detach().float() / scale).round().to(torch.int8))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        buffers: Any = self._buffers
        return nn.functional.linear(x, buffers["values"].to(x.dtype) * buffers["scale"].to(x.dtype), buffers["bias"])


def eight_bit(model: Any) -> Any:
    """A copy of a model whose decoder's linear layers hold int8; the rest is copied as it is. At no time is there a
    second copy of those layers' weights."""
    replaced = dict(_decoder_linears(model))
    memo: dict[int, Any] = {}
    for module in replaced.values():
        weight = module.weight.T if is_transposed(module) else module.weight
        memo[id(module)] = _EightBit(weight, module.bias)
    return copy.deepcopy(model, memo)


def _decoder_linears(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in arch.decoder(model).named_modules():
        if type(module) is nn.Linear or is_transposed(module):
            yield name, module
