"""How much of a model goes: the settings of `quality` and `paper`, and the widths that they come to.

A setting is a share of the units of each kind in a range of layers, as in the papers, or a share of all parameters in
every layer. The latter leaves open how much of it heads give and how much channels do: `NAME:G` keeps G KV groups a
layer, and as many channels as then come nearest to the share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import hywia_kernels as hk
from hywia_kernels.arch.facts import count_parameters
from hywia_kernels.types import Group

from .peers import Shares


@dataclass(frozen=True)
class Setting:
    """One of `shares` and `ratio`.

    Attributes:
        shares: kind -> share of its units that goes, in `layers`.
        ratio: share of all parameters that goes, the same widths in every layer; heads and channels.
        layers: where `shares` go; None: in the layers at hand.
        kv_groups: KV groups that stay in every layer under `ratio`; None: as a plan chooses.
    """

    shares: Shares | None = None
    ratio: float | None = None
    kv_groups: int | None = None
    layers: range | None = None


SETTINGS: dict[str, Setting] = {
    "A25": Setting({"mlp": 0.25}),
    "A50": Setting({"mlp": 0.5}),
    "B25": Setting({"mlp": 0.25, "attention": 1 / 3}),
    "B60": Setting({"mlp": 0.6, "attention": 1 / 3}),
    "P30": Setting(ratio=0.3),
    "P50": Setting(ratio=0.5),
}


def setting(name: str) -> Setting:
    """The setting of `NAME[:G]`.

    Raises:
        ValueError: an unknown name, or a number of KV groups where the setting has shares of its own.
    """
    base, colon, kv_groups = name.partition(":")
    if base not in SETTINGS or (colon and (SETTINGS[base].ratio is None or not kv_groups.isdigit())):
        raise ValueError(f"expected one of {', '.join(SETTINGS)}, a P setting with :G behind it, got {name!r}")
    return replace(SETTINGS[base], kv_groups=int(kv_groups)) if colon else SETTINGS[base]


def expanded(names: Sequence[str], splits: Sequence[int] | None) -> list[str]:
    """The settings' names, each P setting once for each split where any are given."""
    found: list[str] = []
    for name in names:
        open_split = setting(name).ratio is not None and setting(name).kv_groups is None
        found += [f"{name}:{g}" for g in splits] if splits and open_split else [name]
    return found


def widths_of_split(model: Any, ratio: float, kv_groups: int, align: int) -> dict[str, int]:
    """Kind -> units that stay in every layer when so many KV groups do: the multiple of `align` of channels that comes
    nearest to the share of all parameters.

    Raises:
        SystemExit: layers of several widths, more KV groups than there are, or no width within half a step.
    """
    by_kind: dict[str, list[Group]] = {}
    for group in hk.groups(model):
        by_kind.setdefault(group.kind, []).append(group)
    units = {kind: {g.units for g in members} for kind, members in by_kind.items()}
    if set(units) != {"mlp", "attention"} or any(len(widths) != 1 for widths in units.values()):
        raise SystemExit("--split: expected a model with heads and channels whose layers are equally wide")
    heads, channels = (next(iter(units[kind])) for kind in ("attention", "mlp"))
    if not 1 <= kv_groups <= heads:
        raise SystemExit(f"--split: expected 1 to {heads} KV groups, got {kv_groups}")
    cost = {kind: sum(g.unit_parameters for g in members) for kind, members in by_kind.items()}
    wanted = ratio * count_parameters(model) - (heads - kv_groups) * cost["attention"]
    options = [*range(align, channels, align), channels]
    width = min(options, key=lambda w: (abs((channels - w) * cost["mlp"] - wanted), -w))
    if abs((channels - width) * cost["mlp"] - wanted) > align * cost["mlp"] / 2 + 1:
        raise SystemExit(f"--split: with {kv_groups} KV groups no width of the MLP removes {ratio:.0%} of the model")
    return {"attention": kv_groups, "mlp": width}


def shares_of_widths(model: Any, widths: dict[str, int]) -> Shares:
    """Kind -> share of its units that goes, of widths that stay; kinds that stay whole are left out."""
    units = {g.kind: g.units for g in hk.groups(model)}
    return {kind: 1.0 - widths[kind] / units[kind] for kind in widths if widths[kind] < units[kind]}
