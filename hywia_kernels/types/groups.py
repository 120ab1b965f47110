"""Units: what a model loses together, and where it lies in the model's matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import HywiaError
from ..settings import GROUP_KINDS

__all__ = [
    "Group",
    "Member",
    "by_name",
    "channels_of_gone_experts",
    "check_together",
    "experts_of",
    "is_count",
    "is_name",
    "removed_parameters",
    "short",
]


def is_count(value: Any, minimum: int) -> bool:
    """Whether a value is an integer, no bool, and at least the minimum."""
    return type(value) is int and value >= minimum


def is_name(value: Any) -> bool:
    """Whether a value is a string that is not empty."""
    return type(value) is str and value != ""


@dataclass(frozen=True)
class Member:
    """One matrix of a group. Unit `u` is its `group_size` rows (axis 0) or columns from `start + u·group_size` on.

    Attributes:
        module: the module's name in the model.
        axis: axis of the stored parameter on which the units lie; of `parameter[index]` where there is an index.
        group_size: how many consecutive rows or columns are one unit.
        start: the first unit's first row or column; not 0 where one parameter holds several matrices.
        parameter: name of the module's parameter.
        index: which of a stacked parameter's matrices it is. None where the parameter is one matrix (or a vector), and
            where the units are themselves the matrices of a stacked parameter.
        bias: name of the module's parameter with one entry per row or column of `axis`; None where there is none.

    Raises:
        HywiaError: a field has another type or value than described here.
    """

    module: str
    axis: int
    group_size: int
    start: int = 0
    parameter: str = "weight"
    index: int | None = None
    bias: str | None = None

    def __post_init__(self) -> None:
        if (
            type(self.module) is str
            and type(self.axis) is int
            and 0 <= self.axis <= 1
            and is_count(self.group_size, 1)
            and is_count(self.start, 0)
            and is_name(self.parameter)
            and (self.index is None or is_count(self.index, 0))
            and (self.bias is None or is_name(self.bias))
        ):
            return
        raise HywiaError(f"member: expected a matrix's module, axis, sizes and names, got {self}")


@dataclass(frozen=True)
class Group:
    """The coupled matrices of one layer that lose units together.

    Attributes:
        name: `<layer>.<kind>`, unique in a model, e.g. "model.layers.3.mlp".
        kind: "mlp", "attention" or "experts".
        layer: index of the decoder layer.
        units: how many units there are.
        unit: what one unit is: "channel", "head", "kv_group" or "expert".
        members: the matrices, in the table's order; a unit sends its output on through the last one.
        unit_parameters: parameters (weights, row biases, vectors) that leave with one unit.
        stock_counts: unit counts a stock config can describe when every layer has the same; empty means any.
        vectors: parameters with entries per unit that leave with it and are not scored.
        min_units: fewest units that can stay.
        tied_width: groups with the same name here must keep equally many units, as one parameter stacks their
            matrices; "" where the group's width is its own.
        width_field: config field that holds the width; "" where the config has none.

    Raises:
        HywiaError: a field has another type or value than described here.
    """

    name: str
    kind: str
    layer: int
    units: int
    unit: str
    members: tuple[Member, ...]
    unit_parameters: int
    stock_counts: tuple[int, ...] = ()
    vectors: tuple[Member, ...] = ()
    min_units: int = 1
    tied_width: str = ""
    width_field: str = ""

    def __post_init__(self) -> None:
        flaw = self._first_flaw()
        if flaw is not None:
            field, expected = flaw
            raise HywiaError(f"group {self.name!r}: expected {expected}, got {field}={getattr(self, field)!r}")

    def _first_flaw(self) -> tuple[str, str] | None:
        """The first field that is wrong, and what it should be; None where all are right."""
        if not is_name(self.name):
            return "name", "a name"
        if self.kind not in GROUP_KINDS:
            return "kind", f"one of {', '.join(GROUP_KINDS)}"
        if not is_count(self.layer, 0):
            return "layer", "a layer's index"
        if not is_count(self.units, 1):
            return "units", "at least one unit"
        if not is_count(self.unit_parameters, 0):
            return "unit_parameters", "a number of parameters"
        if not (is_count(self.min_units, 1) and self.min_units <= self.units):
            return "min_units", f"1 to {self.units} units"
        if not self.members:
            return "members", "at least one matrix"
        for name in ("members", "vectors"):
            members = getattr(self, name)
            if type(members) is not tuple or not all(type(m) is Member for m in members):
                return name, "a tuple of members"
        if type(self.stock_counts) is not tuple or not all(is_count(n, 1) for n in self.stock_counts):
            return "stock_counts", "a tuple of unit counts"
        for name in ("unit", "tied_width", "width_field"):
            if type(getattr(self, name)) is not str:
                return name, "a string"
        return None


def by_name(groups: Any) -> dict[str, Group]:
    """The groups by name.

    Raises:
        HywiaError: no tuple of groups, or two of them have one name.
    """
    if type(groups) is not tuple or not groups or not all(isinstance(g, Group) for g in groups):
        raise HywiaError(f"groups: expected a tuple of at least one group, got {short(groups)}")
    named = {g.name: g for g in groups}
    if len(named) != len(groups):
        names = [g.name for g in groups]
        twice = next(n for n in names if names.count(n) > 1)
        raise HywiaError(f"groups: expected each name once, got {twice} twice")
    return named


def short(value: Any) -> str:
    """A value's `repr`, cut to 80 characters, for messages."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_together(groups: Sequence[Group], counts: Mapping[str, int]) -> None:
    """Make sure that groups which depend on each other can keep these numbers of units.

    Args:
        groups: all groups of a model. counts: group name -> units that it keeps.

    Raises:
        HywiaError: matrices stacked in one parameter keep different counts.
    """
    widths: dict[str, dict[int, str]] = {}
    for group in groups:
        if group.tied_width:
            widths.setdefault(group.tied_width, {})[counts[group.name]] = group.name
    for name, by_count in widths.items():
        if len(by_count) > 1:
            (a, one), (b, two) = list(by_count.items())[:2]
            raise HywiaError(
                f"plan: {one} keeps {a} and {two} {b}, but the matrices of {name} are stacked in one parameter and "
                "must stay equally wide; plan with the same share for both"
            )


def experts_of(groups: Iterable[Group]) -> list[tuple[Group, list[Group]]]:
    """Each group of whole experts, with the groups of their channels by the experts' order: these are alike but for
    which matrices of the stack they lie on."""
    groups = list(groups)
    stacks: dict[str, list[Group]] = {}
    for group in groups:
        if group.tied_width:
            stacks.setdefault(group.members[0].module, []).append(group)
    whole = [group for group in groups if group.kind == "experts"]
    return [(g, sorted(stacks.get(g.members[-1].module, ()), key=lambda c: c.members[0].index or 0)) for g in whole]


def channels_of_gone_experts(groups: Iterable[Group], keep: Mapping[str, Any]) -> set[str]:
    """Names of the groups of channels whose expert goes.

    Args:
        groups: of the layers that stay. keep: group name -> units that it keeps, int64.
    """
    names: set[str] = set()
    for whole, channels in experts_of(groups):
        stays = set(keep[whole.name].tolist())
        names |= {group.name for e, group in enumerate(channels) if e not in stays}
    return names


def removed_parameters(groups: Iterable[Group], counts: Mapping[str, int]) -> int:
    """How many parameters go when groups keep so many units. Channels of an expert that goes are counted with it.

    Args:
        groups: of the layers that stay. counts: group name -> units that it keeps.
    """
    groups = list(groups)
    removed = sum((g.units - counts[g.name]) * g.unit_parameters for g in groups)
    for whole, channels in experts_of(groups):
        if channels:
            one = channels[0]
            twice = (whole.units - counts[whole.name]) * (one.units - counts[one.name])
            removed -= twice * one.unit_parameters
    return removed
