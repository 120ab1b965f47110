"""What a recovery trains of a model, put on for the training and taken off again: scales, low-rank updates, all."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import arch
from ...arch.facts import weight_bytes
from ...arch.views import is_transposed
from ...engine.patches import hooked
from ...errors import HywiaError
from ...types import Group

__all__ = ["Tuned", "has_peft", "norm_weights", "prepared", "training_bytes"]


@dataclass
class Tuned:
    """What is trained.

    Attributes:
        own: trained tensors that are no parameters of the model, by name.
        parameters: all that is trained, by name, each once.
        finish: writes into the model's own weights what lies beside them; afterwards the model is a plain one.
    """

    own: dict[str, nn.Parameter]
    parameters: dict[str, nn.Parameter]
    finish: Callable[[], None]


@contextmanager
def prepared(model: Any, tune: str, rank: int) -> Iterator[Tuned]:
    """A model of which only what is tuned asks for gradients, trained parameters in float32; inside the context it
    computes with what lies beside its weights. At the end its dtypes, flags and modules are as they were, whether or
    not `finish` was called; weights are what training or `finish` made of them.

    Raises:
        HywiaError: `tune` finds nothing to train, or needs a package that is not installed.
    """
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    dtypes = [(p, p.dtype) for p in model.parameters()]
    with ExitStack() as stack:
        stack.callback(_restore, frozen, dtypes)
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        kinds: dict[str, Callable[[], Any]] = {
            "full": lambda: _full(model),
            "scales": lambda: _scaled(model),
            "lora": lambda: _low_rank(model, rank),
        }
        tuned = stack.enter_context(kinds[tune]())
        if not tuned.parameters:
            raise HywiaError(f"recover: tune: {tune!r} finds nothing to train in this model; use 'full'")
        yield tuned


def _restore(frozen: list[tuple[nn.Parameter, bool]], dtypes: list[tuple[nn.Parameter, torch.dtype]]) -> None:
    for parameter, dtype in dtypes:
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
        parameter.grad = None
    for parameter, wanted in frozen:
        parameter.requires_grad_(wanted)


def _train(parameter: nn.Parameter) -> nn.Parameter:
    """In float32, since updates of 16-bit weights are lost in their rounding."""
    if parameter.dtype != torch.float32:
        parameter.data = parameter.data.float()
    parameter.requires_grad_(True)
    return parameter


@contextmanager
def _full(model: Any) -> Iterator[Tuned]:
    parameters = {name: _train(parameter) for name, parameter in model.named_parameters()}
    yield Tuned({}, parameters, lambda: None)


def norm_weights(model: Any) -> dict[str, nn.Parameter]:
    """Weights and biases of the decoder's norms, by name: vectors of modules that are called norms."""
    found = {}
    for name, parameter in arch.decoder(model).named_parameters():
        module = name.rpartition(".")[0].rpartition(".")[2].lower()
        if parameter.dim() == 1 and ("norm" in module or module.startswith("ln")):
            found[f"decoder.{name}"] = parameter
    return found


@contextmanager
def _scaled(model: Any) -> Iterator[Tuned]:
    """One factor `exp(s)` for what each unit sends on, at the input of its output matrix; and the norms' weights."""
    groups = [g for g in arch.groups(model) if g.members[-1].index is None and g.kind != "experts"]
    scales = {g.name: nn.Parameter(torch.zeros(g.units, device=_output(model, g).weight.device)) for g in groups}

    def factors(group: Group) -> Tensor:
        return scales[group.name].exp().repeat_interleave(group.members[-1].group_size)

    def hook(group: Group) -> Any:
        member = group.members[-1]

        def multiply(module: nn.Module, arguments: tuple) -> tuple:
            x, by = arguments[0], factors(group)
            if x.shape[-1] == by.numel():
                return (x * by.to(x.dtype), *arguments[1:])
            whole = torch.ones(x.shape[-1], device=by.device).index_put(
                (torch.arange(member.start, member.start + by.numel(), device=by.device),), by
            )
            return (x * whole.to(x.dtype), *arguments[1:])

        return multiply

    def fold() -> None:
        with torch.no_grad():
            for group in groups:
                part = arch.view(model, group.members[-1], group.units)
                by = factors(group).to(part.device)
                part.copy_(part.float() * (by[None] if group.members[-1].axis == 1 else by[:, None]))
                scales[group.name].zero_()

    trained = {name: _train(parameter) for name, parameter in norm_weights(model).items()}
    with hooked([(_output(model, g), hook(g)) for g in groups], before=True):
        yield Tuned(scales, {**scales, **trained}, fold)


def _output(model: Any, group: Group) -> Any:
    return model.get_submodule(group.members[-1].module)


@contextmanager
def _low_rank(model: Any, rank: int) -> Iterator[Tuned]:
    """PEFT's low-rank updates of the decoder's linear layers, the head left out, and the norms' weights."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise HywiaError(
            "recover: tune: 'lora' needs the package peft: pip install 'hywia_kernels[recover]', or use 'full' or "
            "'scales'"
        ) from None
    decoder = arch.decoder(model)
    targets = [n for n, m in decoder.named_modules() if isinstance(m, nn.Linear) or is_transposed(m)]
    if not targets:
        raise HywiaError("recover: tune: 'lora' finds no linear layer in this model; use 'full' or 'scales'")
    wide = min(min(decoder.get_submodule(n).weight.shape) for n in targets)
    config = LoraConfig(r=min(rank, wide), lora_alpha=2 * min(rank, wide), lora_dropout=0.0, target_modules=targets)
    inject_adapter_in_model(config, decoder)
    layers = [(n, m) for n, m in decoder.named_modules() if isinstance(m, BaseTunerLayer)]
    try:
        own = {}
        for name, parameter in decoder.named_parameters():
            if "lora_" in name:
                own[name] = parameter.requires_grad_(True)
                parameter.data = parameter.data.float()
        trained = {name: _train(parameter) for name, parameter in norm_weights(model).items()}

        def merge() -> None:
            for _, layer in layers:
                layer.merge(safe_merge=True)

        yield Tuned(own, {**own, **trained}, merge)
    finally:
        for name, layer in layers:
            parent, _, leaf = name.rpartition(".")
            setattr(decoder.get_submodule(parent), leaf, layer.get_base_layer())


def has_peft() -> bool:
    """Whether low-rank updates can be had."""
    return importlib.util.find_spec("peft") is not None


def training_bytes(model: Any, tune: str, rank: int) -> int:
    """Bytes that training takes beside the weights as they are: trained parameters in float32, their gradients and two
    moments of AdamW. Activations come on top."""
    weights = sum(p.numel() for p in model.parameters())
    if tune == "full":
        return 16 * weights - weight_bytes(model)
    if tune == "lora":
        linears = [m for m in arch.decoder(model).modules() if isinstance(m, nn.Linear)]
        return 16 * sum(rank * (m.in_features + m.out_features) for m in linears)
    return 16 * sum(g.units for g in arch.groups(model)) + 16 * sum(p.numel() for p in norm_weights(model).values())
