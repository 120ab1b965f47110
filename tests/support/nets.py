"""Small networks that Torch-Pruning's graphs know, and groups made by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .models import random_model, sizes


class Convolutions(nn.Module):
    """Plain, grouped and transposed convolutions, a residual sum, BatchNorm, and a linear layer."""

    def __init__(self, normalised: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if normalised else nn.Identity()
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose2d(8, 12, 2, stride=2)
        self.last = nn.Conv2d(12, 6, 1, bias=False)
        self.linear = nn.Linear(6, 10)

    def forward(self, x):
        x = functional.relu(self.norm(self.first(x)))
        x = functional.relu(self.grouped(x)) + x
        x = functional.relu(self.last(self.transposed(x)))
        return self.linear(x.mean((2, 3)))


class Flattened(nn.Module):
    """Four columns of a linear layer for every channel of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.linear = nn.Linear(6 * 4, 5)

    def forward(self, x):
        return self.linear(functional.adaptive_avg_pool2d(self.conv(x), 2).flatten(1))


class Concatenated(nn.Module):
    """Members that reach a part of the next layer's channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.joined = nn.Conv2d(10, 5, 1)

    def forward(self, x):
        return self.joined(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3))


class FusedGate(nn.Module):
    """Gate and up in one matrix, split in two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


def llama(kv_heads: int = 8, layers: int = 2):
    """Eight query heads of eight; eager attention, since Torch-Pruning cannot see heads through fused kernels."""
    fields = sizes(96, 64, 80, layers, heads=8, kv_heads=kv_heads)
    more = {"head_dim": 8, "use_cache": False, "attn_implementation": "eager", "initializer_range": 0.1}
    return random_model(seed=None, **fields, **more)


@dataclass
class Item:
    """One member of a group made by hand."""

    dep: Any
    idxs: list
    root_idxs: list

    def __iter__(self):
        return iter((self.dep, self.idxs))


@dataclass
class Group:
    """Torch-Pruning's group, as far as scorers look at it."""

    items: list[Item] = field(default_factory=list)

    def add(self, owner, handler, idxs, root_idxs=None):
        dep = SimpleNamespace(
            layer=owner, pruning_fn=handler, handler=handler, target=SimpleNamespace(module=owner, type=None)
        )
        idxs = list(idxs)
        self.items.append(Item(dep, idxs, idxs if root_idxs is None else list(root_idxs)))
        return self

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]
