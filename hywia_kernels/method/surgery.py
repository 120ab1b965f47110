"""Cut a model in place, parameter by parameter, or mask the same units for comparison."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch, progress
from ..arch.facts import fingerprint
from ..arch.holding import plain_model
from ..checkpoint.adaptive.alibi_hywia_adaptive import SURVIVORS, keep_heads
from ..engine.passes import plain_modes, put_back
from ..errors import HywiaError
from ..types import Group, Plan, check_together
from .compaction import Parts, by_parameter, compact, compact_bias, rescaled, unit_entries
from .layer_masks import zero_layers
from .undo import Removed, Undo, complement

__all__ = ["check_fingerprint", "check_groups", "cut_structure", "mask", "prune", "resize", "zero_units"]


def _removed(group: Group, keep: Tensor) -> Tensor:
    """Indices of the units that are not kept, int64, ascending."""
    return complement(group.units, keep)


def checked_groups(model: nn.Module, plan: Plan) -> tuple[Group, ...]:
    """The plan's groups that stay, once it is seen that the plan is the model's; nothing is changed.

    Raises:
        HywiaError: as `check_groups` and `check_fingerprint`.
    """
    groups = check_groups(model, plan)
    check_fingerprint(plan, fingerprint(model))
    return groups


def check_fingerprint(plan: Plan, found: str) -> None:
    """Raise HywiaError where the weights, of this fingerprint, are not those that the plan was made for."""
    if found != plan.fingerprint:
        raise HywiaError(
            "plan: made from the scores of another model (the weights differ); score this model, in this dtype"
        )


def check_groups(model: nn.Module, plan: Plan) -> tuple[Group, ...]:
    """The plan's groups that stay, all of whose groups are the model's; no weight is read.

    Raises:
        HywiaError: the groups are not those that the plan was made for, a group would keep too few units, groups that
            must stay equal would not, or the family's config cannot describe the layers that stay.
    """
    groups = arch.groups(model)
    if groups != plan.groups:
        theirs = {g.name: g.units for g in plan.groups}
        differ = [g.name for g in groups if theirs.get(g.name) != g.units]
        raise HywiaError(
            f"plan: made for another model, or this one is pruned already (first difference: "
            f"{differ[0] if differ else 'its groups'}); plan again from this model's scores"
        )
    if plan.depth is not None:
        if plan.depth.parameters != arch.layer_parameters(model):
            raise HywiaError("plan: made for a model with other layers; plan again from this model's scores")
        arch.check_depth(model, plan.depth.keep)
    groups = plan.staying
    for group in groups:
        keep = plan.keep.get(group.name)
        if keep is None or keep.numel() < group.min_units:
            least = "one" if group.min_units == 1 else str(group.min_units)
            kept = "nothing" if keep is None or keep.numel() == 0 else str(keep.numel())
            raise HywiaError(
                f"plan: {group.name} keeps {kept}; every such group must keep at least {least} {group.unit}"
            )
    counts = {g.name: plan.keep[g.name].numel() for g in groups}
    check_together(groups, counts)
    experts = {counts[g.name] for g in groups if g.kind == "experts"}
    if len(experts) > 1 and getattr(arch.text_config(model), "output_router_logits", False):
        raise HywiaError(
            f"plan: layers keep {sorted(experts)} experts, and the router's auxiliary loss, which the config turns on, "
            "wants as many in all; cut all layers alike, or set config.output_router_logits to False"
        )
    return groups


def _replace(parameter: Tensor, kept: Tensor) -> nn.Parameter:
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def _follow(model: Any, entry: arch.Architecture, groups: Sequence[Group]) -> None:
    """Bring the numbers that modules and their configs keep for themselves up to date with their parameters."""
    by_layer: list[dict[str, int]] = []
    for layer in sorted({g.layer for g in groups}):
        prefix = f"{entry.layers}.{layer}"
        here = [g for g in groups if g.layer == layer]
        quantities: dict[str, int] = {}
        for group in here:
            if group.kind == "attention":
                width = group.units * group.members[-1].group_size
                quantities |= {"kv_heads": group.units, "heads": width // arch.head_dim(model, layer), "width": width}
            elif group.kind == "experts" or group.tied_width or group.name == f"{prefix}.mlp":
                quantities["experts" if group.kind == "experts" else "channels"] = group.units
                quantities |= {"expert_channels": group.units} if group.tied_width else {}
        by_layer.append(quantities)
        for name, attribute, quantity in entry.attributes:
            _set_attribute(model, f"{prefix}.{name}", attribute, {quantities.get(quantity)})
        for name in {m.module for g in here for m in g.members}:
            _set_features(model.get_submodule(name))
    for name, attribute, quantity in entry.whole_attributes:
        _set_attribute(model, name, attribute, {quantities.get(quantity) for quantities in by_layer})


def _set_attribute(model: Any, name: str, attribute: str, values: set[int | None]) -> None:
    """Set a module's attribute, where `values` agree on one and the model has such a module with the attribute.

    Layers of one model may differ in their modules.
    """
    values = values - {None}
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return
    if len(values) == 1 and attribute in vars(module):
        setattr(module, attribute, values.pop())


def _set_features(module: Any) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif hasattr(module, "nf"):  # transformers' Conv1D
        module.nx, module.nf = module.weight.shape


def _follow_config(model: Any, entry: arch.Architecture) -> None:
    """Bring the config's fields up to date where all layers share a width and the config can hold it.

    Where modules read widths from the config and layers differ, each of these modules gets its own copy of the config.
    """
    groups = arch.groups(model)
    config, size = arch.text_config(model), arch.head_dim(model)
    widths = arch.config_widths(model, groups)
    names = entry.attention
    same = {field: w for field, w in widths.items() if len(set(w)) == 1}
    if any(g.stock_counts and g.units not in g.stock_counts for g in groups):
        same = {field: w for field, w in same.items() if field not in (names.heads_field, names.kv_heads_field)}
    for field, layers in same.items():
        if getattr(config, field, None) != layers[0]:
            setattr(config, field, layers[0])
    if names.free_head_dim and not names.size_field:
        config.head_dim = size  # or it would be read off the hidden size, by copies of the config too
    attentions = [g.layer for g in groups if g.kind == "attention"]
    for reader in entry.config_readers:
        for at, layer in enumerate(attentions):
            own = config
            if len(same) < len(widths):
                own = copy.copy(config)
                for field, layers in widths.items():
                    if len(layers) == len(attentions):
                        setattr(own, field, layers[at])
                if names.free_head_dim and not names.size_field:
                    own.head_dim = size
            model.get_submodule(f"{entry.layers}.{layer}.{reader}").config = own
    _follow_changes(model, widths)


def _follow_changes(model: Any, widths: Mapping[str, Sequence[int]]) -> None:
    """Bring up to date what the config records of layers whose widths differed when the model was loaded."""
    if getattr(model.config, "module_changes", None) is None:
        return
    from ..checkpoint.adaptive.modeling_hywia_adaptive import describe_changes

    stock = None
    if not hasattr(model.config, "base_model_type"):
        config = copy.deepcopy(model.config)
        del config.module_changes
        with torch.device("meta"):
            stock = type(model)(config)
    model.config.module_changes = describe_changes(model, stock)
    if hasattr(model.config, "layer_widths"):
        model.config.layer_widths = {field: list(w) for field, w in widths.items()}


def _rescale(model: Any, entry: arch.Architecture, group: Group, kept: int, undo: Undo) -> None:
    """Rescale a norm over all heads, and the matrix before it, as `rescaled` says."""
    for (name, leaf), change in rescaled(entry, group, kept):
        module = model.get_submodule(name)
        if getattr(module, leaf, None) is not None:
            # Replaced: a product in place could not be taken back exactly.
            undo.replace(module, leaf, change(getattr(module, leaf).detach()), None)


def _keep_slopes(model: Any, entry: arch.Architecture, group: Group, keep: Tensor, heads: int) -> None:
    """Leave the surviving heads the ALiBi slopes that they had among `heads` heads."""
    alibi = entry.attention.alibi
    if alibi is None:
        return
    module = model.get_submodule(f"{entry.layers}.{group.layer}.{entry.attention.module}")
    before = getattr(module, SURVIVORS, None) or {"heads": list(range(group.units)), "of": heads}
    keep_heads(module, [before["heads"][i] for i in keep.tolist()], before["of"], alibi.argument, alibi.axis)


@torch.no_grad()
def prune(model: Any, plan: Plan, *, backend: str | None = None) -> None:
    """Remove a plan's units, and the layers that go whole, from a model, in place.

    One parameter is cut at a time and its old memory released, so the peak is the model plus one parameter: what was
    removed is held until all is cut (and where a norm is over all heads, so are its matrices). The config's widths
    follow where all layers share one. Where layers differ the config's widths stay, and `save` writes each layer's.

    Args:
        model: the model that the scores came from. plan: as `hywia_kernels.plan` gives it. backend: of `ops.compact`.

    Raises:
        HywiaError: the plan is not this model's. After this, and after any other error or interrupt, the model is as it
            was, bit for bit; parameters that nothing else holds are other objects then.
    """
    model = plain_model(model, changing=True)
    with plain_modes():
        undo, done = Undo(model), False

        def take_back() -> None:
            if not done:
                undo.roll_back()

        with put_back(take_back):
            _cut(model, plan, backend, undo)
            done = True


def cut_structure(model: Any, plan: Plan) -> tuple[Group, ...]:
    """Give a model without memory, in place, the shapes, attributes and config that the cut model has.

    Returns:
        the groups that stay, as they were.

    Raises:
        HywiaError: as `check_groups`.
    """
    groups = check_groups(model, plan)
    _cut_groups(model, plan, groups, None, Undo(model), by_parameter(groups).items())
    return groups


def _cut(model: Any, plan: Plan, backend: str | None, undo: Undo) -> None:
    groups = checked_groups(model, plan)
    steps = progress.track(list(by_parameter(groups).items()), "cutting")
    _cut_groups(model, plan, groups, backend, undo, steps)


def _cut_groups(
    model: Any,
    plan: Plan,
    groups: Sequence[Group],
    backend: str | None,
    undo: Undo,
    steps: Iterable[tuple[tuple[str, str], Parts]],
) -> None:
    entry = arch.architecture(model)
    heads = getattr(arch.text_config(model), entry.attention.heads_field, 0)
    cut = {g.name for g in groups if plan.keep[g.name].numel() < g.units}
    for (name, leaf), parts in steps:
        if not any(group.name in cut for _, group in parts):
            continue
        module = model.get_submodule(name)
        biased = [part for part in parts if part[0].bias is not None]
        whole = getattr(module, leaf).detach()
        kept, selected = compact(whole, parts, plan.keep, backend)
        undo.replace(module, leaf, kept, [Removed(whole, *part) for part in selected])
        del whole
        if biased:
            bias = getattr(module, biased[0][0].bias or "").detach()
            kept, selected = compact_bias(bias, biased, plan.keep, backend)
            undo.replace(module, "bias", kept, [Removed(bias, *part) for part in selected])
            del bias
    for group in groups:
        if group.kind == "attention" and group.name in cut:
            _rescale(model, entry, group, plan.keep[group.name].numel(), undo)
            _keep_slopes(model, entry, group, plan.keep[group.name], heads)
    if plan.depth is not None:
        arch.keep_layers(model, plan.depth.keep)  # what `undo` holds puts them back
    _follow(model, entry, arch.groups(model))
    _follow_config(model, entry)


def resize(model: Any, counts: Mapping[str, int]) -> None:
    """Give groups other widths, in place, in a model whose weights are about to be loaded.

    Each member's parameters are replaced by uninitialised ones of the new shape, on the same device (which may be
    meta) and in the same dtype.

    Args:
        model: of a known architecture. counts: group name -> units; groups that it leaves out keep their width.

    Raises:
        HywiaError: an unknown group, fewer units than can be, groups that must stay equal and would not, or heads with
            ALiBi slopes of their own, which a count cannot name.
    """
    entry = arch.architecture(model)
    groups = {g.name: g for g in arch.groups(model)}
    for name, units in counts.items():
        group = groups.get(name)
        if group is None:
            raise HywiaError(f"resize: expected groups of the model, got {name!r}; groups(model) lists them")
        if units < group.min_units:
            least = "one" if group.min_units == 1 else str(group.min_units)
            raise HywiaError(f"resize: expected at least {least} {group.unit} in {name}, got {units}")
        if group.kind == "attention" and entry.attention.alibi is not None and units != group.units:
            raise HywiaError(f"resize: {name} has slopes that belong to heads; a count does not say which stay")
    wanted = {name: counts.get(name, group.units) for name, group in groups.items()}
    check_together(list(groups.values()), wanted)
    for (name, leaf), parts in by_parameter(list(groups.values())).items():
        module = model.get_submodule(name)
        parameter = getattr(module, leaf)
        shape, bias = list(parameter.shape), 0
        # Matrices of one stack stay equally wide, so the first one stands for all.
        for member, group in parts:
            change = (wanted[group.name] - group.units) * member.group_size
            if member.index in (None, 0):
                shape[member.axis + (member.index is not None)] += change
            bias += change if member.bias is not None else 0
        if shape != list(parameter.shape):
            setattr(module, leaf, _replace(parameter, parameter.detach().new_empty(shape)))
        if bias:
            module.bias = _replace(module.bias, module.bias.new_empty(module.bias.numel() + bias))
    _follow(model, entry, arch.groups(model))
    if entry.config_readers:
        _follow_config(model, entry)


class _RemainingExperts:
    """A router's `forward` that routes tokens to the kept experts only, as it does once the others are cut."""

    def __init__(self, router: Any, keep: Tensor) -> None:
        self.keep = keep
        self.router = copy.copy(router)
        self.router.__dict__.pop("forward", None)
        self.router._parameters = {**router._parameters, "weight": nn.Parameter(router.weight[keep])}
        self.router.num_experts = keep.numel()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = self.router(*args, **kwargs)
        return logits, weights, self.keep.to(indices.device)[indices]


@torch.no_grad()
def mask(model: Any, plan: Plan) -> None:
    """Zero a plan's removed units in place and keep the shapes; the pruned model must give the same outputs.

    Rows, their biases and columns are all zeroed, so every member of a removed unit is without effect by itself. A
    router's zero row would still draw tokens, so routers are made to choose among the experts that stay. Layers that go
    become zero altogether, norms and biases too: then they hand on what they get.

    Raises:
        HywiaError: the plan is not this model's, or the family's layers do not hand on what they get when they are
            zero.
    """
    model = plain_model(model, changing=True)
    with plain_modes():
        groups = checked_groups(model, plan)
        if plan.depth is not None:
            zero_layers(model, plan.depth)
        for group in groups:
            zero_units(model, group, plan.keep[group.name])


@torch.no_grad()
def zero_units(model: Any, group: Group, keep: Tensor) -> None:
    """Zero the units of one group that are not kept; see `mask`."""
    gone = _removed(group, keep)
    if not gone.numel():
        return
    for member in (*group.members, *group.vectors):
        part = arch.view(model, member, group.units)
        entries = unit_entries(gone, member.group_size).to(part.device)
        part.index_fill_(member.axis, entries, 0.0)
        if member.bias is not None:
            bias = getattr(model.get_submodule(member.module), member.bias)
            bias.index_fill_(0, entries + member.start, 0.0)
    if group.kind == "experts":
        router = model.get_submodule(group.members[0].module)
        router.forward = _RemainingExperts(router, keep)
