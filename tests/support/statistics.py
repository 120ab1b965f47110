"""The statistics' meaning, written out: one backward per sample, full gradients kept, no table, no engine."""

from __future__ import annotations

import torch

LAYER = (
    ("self_attn.q_proj", 0, "attention"),
    ("self_attn.k_proj", 0, "attention"),
    ("self_attn.v_proj", 0, "attention"),
    ("self_attn.o_proj", 1, "attention"),
    ("mlp.gate_proj", 0, "mlp"),
    ("mlp.up_proj", 0, "mlp"),
    ("mlp.down_proj", 1, "mlp"),
)


def _unit_sums(matrix, axis, units, query_heads=None, wrong_kv_stride=False):
    """Sum float64 `matrix` over the rows (axis 0) or columns (axis 1) of each unit."""
    per_line = matrix.sum(1 - axis)
    if query_heads is None or not wrong_kv_stride:
        return per_line.view(units, -1).sum(1)
    rep = query_heads // units
    return per_line.view(rep, units, -1).sum((0, 2))  # heads k, k + units, ... credited to KV head k


def plain_statistics(model, samples, wrong_kv_stride=False):
    """group name -> (order -> fine [units], coarse [members, samples, units]), float64."""
    gradients: dict[str, list[torch.Tensor]] = {}
    names = [f"model.layers.{i}.{n}" for i in range(model.config.num_hidden_layers) for n, _, _ in LAYER]
    for sample in samples:
        model.zero_grad(set_to_none=True)
        logits = model(sample[None]).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, sample[1:]).backward()
        for name in names:
            gradients.setdefault(name, []).append(model.get_submodule(name).weight.grad.double().clone())
    model.zero_grad(set_to_none=True)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    result = {}
    for i in range(model.config.num_hidden_layers):
        for kind in ("attention", "mlp"):
            fine = {"first": 0.0, "second": 0.0, "mixed": 0.0}
            coarse = []
            for name, axis, of in LAYER:
                if of != kind:
                    continue
                full = f"model.layers.{i}.{name}"
                w = model.get_submodule(full).weight.detach().double()
                stack = torch.stack(gradients[full])
                g, f = stack.mean(0), stack.square().mean(0)
                units = kv_heads if kind == "attention" else w.shape[axis]
                q = heads if name in ("self_attn.q_proj", "self_attn.o_proj") else None
                terms = {"first": g * w, "second": 0.5 * f * w * w, "mixed": g * w - 0.5 * f * w * w}
                for order, t in terms.items():
                    fine[order] = fine[order] + _unit_sums(t.abs(), axis, units, q, wrong_kv_stride)
                coarse.append(torch.stack([_unit_sums(s * w, axis, units, q, wrong_kv_stride) for s in stack]))
            result[f"model.layers.{i}.{kind}"] = (fine, torch.stack(coarse))
    return result
