"""Torch-Pruning's and LLM-Pruner's contracts: the groups each tool's pruner hands to its scorer, and the criteria."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import llm_pruner

__all__ = ["CONTRACTS", "Case", "Contract", "backward", "eager_attention"]


@dataclass(frozen=True)
class Case:
    """One criterion: both scorers, and what fills in gradients or squares before a scoring of second order."""

    criterion: str
    order: str
    theirs: Callable[[], Any]
    ours: Callable[[], Any]
    prepare_theirs: Callable[[], None] | None = None
    prepare_ours: Callable[[], None] | None = None
    comparable: bool = True  # False where a defect of upstream makes its scores something else


@dataclass(frozen=True)
class Contract:
    """A tool's groups of one model, how it calls a scorer, and the criteria."""

    version: str
    groups: list
    call: Callable[[Any, Any], Tensor | None]
    cases: list[Case]


class Collector:
    """A scorer that keeps the groups and the arguments it is given, and scores nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict]] = []

    def __call__(self, group: Any, **keywords: Any) -> None:
        self.calls.append((group, keywords))


def _heads(model: Any) -> Iterator[tuple[Any, int, int]]:
    for layer in model.model.layers:
        yield layer, model.config.num_attention_heads, model.config.num_key_value_heads


def _every_head_has_its_own_key(model: Any) -> bool:
    """Grouped-query heads are where both tools' scores are known to be wrong."""
    return model.config.num_attention_heads == model.config.num_key_value_heads


@contextlib.contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Both tools read graphs: fused grouped-query attention hides from them which heads go together."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# Torch-Pruning's flow for language models: half of the heads, of the MLP's channels and of the hidden dimensions.
LANGUAGE_MODEL: dict[str, Any] = {
    "global_pruning": False,
    "pruning_ratio": 0.5,
    "head_pruning_ratio": 0.5,
    "prune_num_heads": True,
    "prune_head_dims": False,
    "output_transform": lambda out: out.logits,
    "out_channel_groups": {},
    "in_channel_groups": {},
}


def backward(model: Any, tokens: Tensor) -> None:
    """Leaves the batch's gradients in `.grad`, for first order and for param_mix."""
    model.zero_grad(set_to_none=True)
    llm_pruner.loss(model, tokens).backward()


def torch_pruning(model: Any, tokens: Tensor) -> Contract:
    """Heads, MLP channels and hidden dimensions: every matrix is in two groups."""
    import torch_pruning as tp

    from hywia_kernels.integrations import torch_pruning as ours

    heads = {}
    for layer, queries, keys in _heads(model):
        attention = layer.self_attn
        heads |= {attention.q_proj: queries, attention.k_proj: keys, attention.v_proj: keys}
    collector = Collector()
    pruner_class = getattr(tp.pruner, "BasePruner", None) or tp.pruner.MetaPruner
    pruner = pruner_class(
        model,
        tokens[:2, :8],
        importance=collector,
        num_heads=heads,
        ignored_layers=[model.lm_head],
        **LANGUAGE_MODEL,
    )
    list(pruner.step(interactive=True))
    groups = [group for group, _ in collector.calls]

    def accumulate(scorer: Any) -> Callable[[], None]:
        def run() -> None:
            scorer.zero_grad()
            for sample in tokens:
                model.zero_grad(set_to_none=True)
                llm_pruner.loss(model, sample[None]).backward()
                scorer.accumulate_grad(model)

        return run

    def fisher() -> None:
        model.zero_grad(set_to_none=True)
        ours.accumulate_fisher(model, tokens)

    importance = tp.importance
    hessian = importance.HessianImportance()
    same = _every_head_has_its_own_key(model)
    cases = [
        Case("MagnitudeImportance", "none", importance.MagnitudeImportance, ours.MagnitudeImportance, comparable=same),
        Case("TaylorImportance", "first", importance.TaylorImportance, ours.TaylorImportance, comparable=same),
        Case(
            "TaylorImportance multivariable",
            "first",
            lambda: importance.TaylorImportance(multivariable=True),
            lambda: ours.TaylorImportance(multivariable=True),
            comparable=same,
        ),
        Case(
            "HessianImportance",
            "second",
            lambda: hessian,
            ours.HessianImportance,
            accumulate(hessian),
            fisher,
            comparable=False,
        ),
    ]
    return Contract(tp.__version__, groups, lambda scorer, group: scorer(group), cases)


def llm_pruner_contract(model: Any, tokens: Tensor) -> Contract:
    """Block-wise: heads and MLP channels; every matrix is in one group."""
    import LLMPruner.torch_pruning as tp
    from LLMPruner.pruner import hf_llama_pruner as upstream

    from hywia_kernels.integrations import llm_pruner as ours

    roots = [layer.self_attn.k_proj for layer, _, _ in _heads(model)]
    collector = Collector()
    pruner = tp.pruner.MetaPruner(
        model,
        tokens[:2, :8],
        importance=collector,
        global_pruning=False,
        iterative_steps=1,
        ch_sparsity=0.5,
        ignored_layers=[],
        channel_groups={},
        consecutive_groups={layer.self_attn.k_proj: layer.self_attn.head_dim for layer, _, _ in _heads(model)},
        customized_pruners={type(model.model.norm): upstream.hf_rmsnorm_pruner},
        root_module_types=None,
        root_instances=roots + [layer.mlp.gate_proj for layer, _, _ in _heads(model)],
    )
    list(pruner.step(interactive=True))

    def accumulate() -> None:
        model.zero_grad(set_to_none=True)
        for parameter in model.parameters():
            parameter.__dict__.pop("acc_grad", None)
        for sample in tokens:
            llm_pruner.loss(model, sample[None]).backward()
            for parameter in model.parameters():
                parameter.grad = parameter.grad * parameter.grad / len(tokens)
                if hasattr(parameter, "acc_grad"):
                    parameter.acc_grad += parameter.grad
                else:
                    parameter.acc_grad = parameter.grad.clone()
            model.zero_grad(set_to_none=True)
        llm_pruner.loss(model, tokens).backward()

    def fisher() -> None:
        model.zero_grad(set_to_none=True)
        for parameter in model.parameters():
            parameter.__dict__.pop("acc_grad", None)
        ours.accumulate_fisher(model, tokens, axes="units")

    def case(taylor: str) -> Case:
        order = "second" if taylor in ("param_second", "param_mix") else "first"
        return Case(
            taylor,
            order,
            lambda: upstream.TaylorImportance(taylor=taylor),
            lambda: ours.TaylorImportance(taylor=taylor),
            accumulate if order == "second" else None,
            fisher if order == "second" else None,
            comparable=same,
        )

    same = _every_head_has_its_own_key(model)
    magnitude = Case(
        "MagnitudeImportance", "none", upstream.MagnitudeImportance, ours.MagnitudeImportance, comparable=same
    )
    calls = collector.calls
    return Contract(
        "128a07d",
        calls,
        lambda scorer, call: scorer(call[0], **call[1]),
        [magnitude, *(case(t) for t in ("vectorize", "param_first", "param_second", "param_mix"))],
    )


CONTRACTS = {"torch_pruning": torch_pruning, "llm_pruner": llm_pruner_contract}
