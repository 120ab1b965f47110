"""What a forward pass must do at least: FLOPs of prefill, bytes of a decoding step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import arch
from ..arch.facts import count_parameters, weight_bytes
from ..types import Plan, removed_parameters

__all__ = ["Cost", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """The sizes of a model that decide its speed.

    Attributes:
        matrices: (outputs, inputs) of every matrix that each token is multiplied by, without the head.
        hidden: width of the residual stream.
        head: outputs times inputs of the matrix that makes logits, which only the last token of a sequence needs.
        attention: query heads times head_dim, by layer.
        kv: key heads times head_dim, by layer.
        element_size: bytes of a weight.
        parameters, weight_bytes: number and bytes of the whole model's parameters, tied ones once.
        step_bytes: bytes of weights that one decoding step reads: all but an untied embedding, of which it reads a row.
    """

    matrices: tuple[tuple[int, int], ...]
    hidden: int
    head: int
    attention: tuple[int, ...]
    kv: tuple[int, ...]
    element_size: int
    parameters: int
    weight_bytes: int
    step_bytes: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the cache for one token of one sequence: keys and values of all layers in the weights' dtype."""
        return 2 * sum(self.kv) * self.element_size

    def prefill_flops(self, batch: int, tokens: int) -> float:
        """FLOPs of `batch` prompts of `tokens` each: two per weight and token, causal attention's two products, and
        the head for the last token."""
        products = 2.0 * batch * tokens * sum(n * k for n, k in self.matrices) + 2.0 * batch * self.head
        return products + 2.0 * batch * tokens * tokens * sum(self.attention)

    def decode_bytes(self, batch: int, context: int) -> float:
        """Bytes that one decoding step reads: the weights once, and each sequence's cache of `context` tokens."""
        return self.step_bytes + float(batch) * context * self.kv_bytes_per_token


def cost_of(model: Any, plan: Plan | None = None) -> Cost:
    """The sizes of a model as it is, or as it will be after a plan's cut; the model is not touched."""
    groups = arch.groups(model)
    kept = {g.name: plan.keep[g.name].numel() if plan is not None else g.units for g in groups}
    shapes = _shapes(model)
    attention, kv, gone_whole = [], [], 0
    if plan is not None and plan.depth is not None:
        path = arch.architecture(model).layers
        without = tuple(f"{path}.{i}." for i in plan.depth.gone)
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(without)}
        gone_whole, groups = plan.depth.removed, plan.staying
    removed = gone_whole + removed_parameters(groups, kept)
    for group in groups:
        for member in group.members:
            axis = _logical_axis(member, group)
            gone = (group.units - kept[group.name]) * member.group_size
            if member.module in shapes:
                shapes[member.module][axis] -= gone
            elif member.index == 0:  # of a stack, whose matrices stay equally wide
                stack = shapes[f"{member.module}.{member.parameter}"]
                stack[axis] -= gone * (_experts_per_token(model) if axis == 0 else 1)
        if group.kind == "attention":
            attention.append(kept[group.name] * group.members[-1].group_size)
            kv.append(kept[group.name] * group.members[1].group_size if len(group.members) > 2 else attention[-1])
    size = next(model.parameters()).element_size()
    embedding, head = model.get_input_embeddings().weight, _head(model)
    tied = head is None or head.weight is embedding
    return Cost(
        matrices=tuple((n, k) for n, k in shapes.values()),
        hidden=embedding.shape[1],
        head=(embedding if head is None else head.weight).numel(),
        attention=tuple(attention),
        kv=tuple(kv),
        element_size=size,
        parameters=count_parameters(model) - removed,
        weight_bytes=weight_bytes(model) - removed * size,
        step_bytes=weight_bytes(model) - removed * size - (0 if tied else embedding.numel() * size),
    )


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _logical_axis(member: Any, group: Any) -> int:
    """0 for a member that makes the units' outputs, 1 for the one that takes them: the last, however it is stored."""
    return int(member is group.members[-1])


def _experts_per_token(model: Any) -> int:
    """How many experts a token goes to; 1 in a model without experts."""
    return getattr(model.config, "num_experts_per_tok", None) or 1


def _shapes(model: Any) -> dict[str, list[int]]:
    """Module -> [outputs, inputs] of every matrix that a token is multiplied by, without head and embeddings.

    The outputs of a stack of experts count once for each expert that a token goes to.
    """
    shapes: dict[str, list[int]] = {}
    skip = {id(model.get_input_embeddings()), id(_head(model))}
    for name, module in model.named_modules():
        if id(module) in skip or isinstance(module, nn.Embedding):
            continue
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2:
            transposed = hasattr(module, "nf")  # transformers' Conv1D stores [inputs, outputs]
            shapes[name] = list(weight.shape[::-1]) if transposed else list(weight.shape)
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                shapes[f"{name}.{leaf}"] = [parameter.shape[1] * _experts_per_token(model), parameter.shape[2]]
    return shapes
