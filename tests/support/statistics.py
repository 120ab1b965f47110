"""The statistics' meaning, written out: one backward per sample, full gradients kept, no table, no engine.

`plain_statistics` is LLaMA's, with the members of a layer told here; `family_statistics` another family's, from its
own list of parts.
"""

from __future__ import annotations

import torch

import hywia_kernels as hk

from .comparison import ORDERS

LAYER = (
    ("self_attn.q_proj", 0, "attention"),
    ("self_attn.k_proj", 0, "attention"),
    ("self_attn.v_proj", 0, "attention"),
    ("self_attn.o_proj", 1, "attention"),
    ("mlp.gate_proj", 0, "mlp"),
    ("mlp.up_proj", 0, "mlp"),
    ("mlp.down_proj", 1, "mlp"),
)
Statistics = dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]]


def sample_gradients(model, samples) -> dict[str, torch.Tensor]:
    """Parameter -> gradient of each sample's own loss, float64 `[samples, ...]`."""
    gradients: dict[str, list[torch.Tensor]] = {}
    for sample in samples:
        model.zero_grad(set_to_none=True)
        out = model(sample[None]).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(out, sample[1:]).backward()
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.setdefault(name, []).append(gradient.double())
    model.zero_grad(set_to_none=True)
    return {name: torch.stack(each) for name, each in gradients.items()}


def taylor_terms(weight: torch.Tensor, gradients: torch.Tensor) -> dict[str, torch.Tensor]:
    """Order -> what its fine sums add the magnitudes of; `gradients` are `[samples, ...]`."""
    mean, fisher = gradients.mean(0), gradients.square().mean(0)
    first, second = mean * weight, 0.5 * fisher * weight * weight
    return {"first": first, "second": second, "mixed": first - second}


def _unit_sums(matrix, axis, units, query_heads=None, wrong_kv_stride=False):
    """Sum float64 `matrix` over the rows (axis 0) or columns (axis 1) of each unit."""
    per_line = matrix.sum(1 - axis)
    if query_heads is None or not wrong_kv_stride:
        return per_line.view(units, -1).sum(1)
    rep = query_heads // units
    return per_line.view(rep, units, -1).sum((0, 2))  # heads k, k + units, ... credited to KV head k


def plain_statistics(model, samples, wrong_kv_stride=False) -> Statistics:
    """group name -> (order -> fine [units], coarse [members, samples, units]), float64."""
    gradients, weights = sample_gradients(model, samples), dict(model.named_parameters())
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    result = {}
    for i in range(model.config.num_hidden_layers):
        for kind in ("attention", "mlp"):
            fine, coarse = dict.fromkeys(ORDERS, 0.0), []
            for name, axis, of in LAYER:
                if of != kind:
                    continue
                full = f"model.layers.{i}.{name}.weight"
                w, g = weights[full].detach().double(), gradients[full]
                units = kv_heads if kind == "attention" else w.shape[axis]
                q = heads if name in ("self_attn.q_proj", "self_attn.o_proj") else None
                for order, t in taylor_terms(w, g).items():
                    fine[order] = fine[order] + _unit_sums(t.abs(), axis, units, q, wrong_kv_stride)
                coarse.append(torch.stack([_unit_sums(s * w, axis, units, q, wrong_kv_stride) for s in g]))
            result[f"model.layers.{i}.{kind}"] = (fine, torch.stack(coarse))
    return result


def family_statistics(family, model, samples) -> Statistics:
    """The same of a model of `family` (see `families.Family`), from the family's parts, without the table."""
    gradients, weights = sample_gradients(model, samples), dict(model.named_parameters())

    def of(prefix, parts, units, expert=None):
        fine, coarse = {order: torch.zeros(units, dtype=torch.float64) for order in ORDERS}, []
        for name, part in parts:
            w, g = weights[prefix + name].detach().double(), gradients[prefix + name]
            w, g = (w, g) if expert is None else (w[expert], g[:, expert])
            for order, t in taylor_terms(w, g).items():
                fine[order] += torch.stack([part(t, u).abs().sum() for u in range(units)])
            coarse.append(torch.stack([torch.stack([part(s * w, u).sum() for u in range(units)]) for s in g]))
        return fine, torch.stack(coarse)

    found = {}
    for group in hk.groups(model):
        prefix = f"{family.layers}.{group.layer}."
        if group.kind == "attention":
            found[group.name] = of(prefix, family.attention, group.units)
        elif group.kind == "experts":
            whole = [(name, lambda w, u: w[u]) for name in ("mlp.gate.weight", "mlp.experts.gate_up_proj")]
            whole.append(("mlp.experts.down_proj", lambda w, u: w[u]))
            found[group.name] = of(prefix, whole, family.experts)
        elif family.experts and group.layer not in family.dense_layers:
            found[group.name] = of(prefix, family.mlp, group.units, int(group.name.rpartition(".")[2]))
        else:
            found[group.name] = of(prefix, family.dense or family.mlp, group.units)
    return found


def assert_statistics(statistics, plain: Statistics, way=None, tolerance: float = 2e-5) -> None:
    """Every vector and matrix within `tolerance` of its largest entry."""
    for group in statistics.groups:
        fine, coarse = plain[group.name]
        for order in ORDERS:
            error = (statistics.fine[group.name][order].double() - fine[order]).abs().max() / fine[order].max()
            assert float(error) <= tolerance, (way, group.name, order)
        error = (statistics.coarse[group.name].double() - coarse).abs().max() / coarse.abs().max()
        assert float(error) <= tolerance, (way, group.name)
