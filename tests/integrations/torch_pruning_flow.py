"""Models, groups and gradients for Torch-Pruning's scorers, and its pruner's language-model flow."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contracts import LANGUAGE_MODEL
from tests.support.nets import Concatenated, Convolutions, Flattened, FusedGate, Group, llama

tp = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")

theirs = tp.importance
function = tp.pruner.function
Pruner = getattr(tp.pruner, "BasePruner", tp.pruner.MetaPruner)
CRITERIA = ("MagnitudeImportance", "TaylorImportance", "HessianImportance")


class Collector:
    def __init__(self):
        self.groups = []

    def __call__(self, group):
        self.groups.append(group)
        return torch.ones(len(group[0].idxs))  # 1.5 cannot do without


def heads_of(model):
    config, heads = model.config, {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
    return heads


def pruner_of(model, importance, **options):
    """The language-model flow: heads, MLP channels and hidden dimensions."""
    return Pruner(
        model,
        torch.arange(16).view(2, 8),
        importance=importance,
        num_heads=heads_of(model),
        ignored_layers=[model.lm_head],
        **(LANGUAGE_MODEL | options),
    )


def groups_of(model, inputs=None):
    if hasattr(model, "lm_head"):
        collector = Collector()
        list(pruner_of(model, collector).step(interactive=True))
        return collector.groups
    graph = tp.DependencyGraph().build_dependency(model, inputs)
    return list(graph.get_all_groups())


def backward(model, inputs):
    model.zero_grad()
    if hasattr(model, "lm_head"):
        model(inputs, labels=inputs).loss.backward()
    else:
        model(inputs).square().mean().backward()


def made(name):
    """`(model, inputs, groups)`, gradients in place."""
    if name.startswith("llama"):
        model, inputs = llama(8 if name == "llama" else 2), torch.randint(96, (3, 12))
    else:
        model = {
            "convolutions": lambda: Convolutions(normalised=False),
            "normalised": Convolutions,
            "concatenated": Concatenated,
            "fused": FusedGate,
            "flattened": Flattened,
        }[name]().eval()
        inputs = torch.randn(4, 8) if name == "fused" else torch.randn(4, 3, 8, 8)
    groups = groups_of(model, inputs)
    backward(model, inputs)
    return model, inputs, groups


def accumulated(scorer, model, inputs, samples=1):
    """One sample is enough for upstream, which keeps the last one only."""
    scorer.zero_grad()
    for sample in inputs[:samples]:
        backward(model, sample[None])
        scorer.accumulate_grad(model)


def hand_group(linear, **roots):
    return Group().add(linear, function.prune_linear_out_channels, range(linear.out_features), **roots)
