"""Which units of a tiny model of each family a few requests keep, as digests that an older commit can be asked for.

Only what the package has had for long is called here, so that this file runs beside an older copy of it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

import hywia_kernels as hk

from .families import FAMILIES, fresh_named, randomised

_SHORT = dict(fusion="attention", samples=6, seq_len=12, reconstruct_samples=24)
# Name -> what is asked for: the papers' protocol with all defaults, one ratio of all parameters, with a search,
# the plain criterion, and experts with heads.
REQUESTS: dict[str, dict[str, Any]] = {
    "group_ratio": dict(group_ratio=0.4, align=4, **_SHORT),
    "ratio": dict(ratio=0.2, align=4, **_SHORT),
    "magnitude": dict(group_ratio=0.4, align=4, criterion="magnitude", **_SHORT),
    "experts": dict(group_ratio={"experts": 0.4, "attention": 0.34}, align=4, **_SHORT),
}


def names() -> list[str]:
    """All families with a tiny model, and Baichuan-13B's stand-in."""
    return [*(family.name for family in FAMILIES), "baichuan"]


def model_of(name: str):
    if name != "baichuan":
        return fresh_named(name)
    from ..arch.baichuan_code.configuration_baichuan import BaichuanConfig
    from ..arch.baichuan_code.modeling_baichuan import BaichuanForCausalLM

    torch.manual_seed(1)
    sizes = dict(vocab_size=131, hidden_size=36, intermediate_size=44, num_hidden_layers=3, num_attention_heads=6)
    config = BaichuanConfig(**sizes, model_max_length=64, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return randomised(BaichuanForCausalLM(config).eval())


def kept_units(name: str, request: str) -> dict[str, list[int]]:
    """Group -> the units that stay."""
    tokens = torch.randint(2, 131, (48, 12), generator=torch.Generator().manual_seed(17))
    result = hk.compress(model_of(name), None, hk.Recipe(**REQUESTS[request]), tokens=tokens, backend="reference")
    return {group: keep.tolist() for group, keep in result.plan.keep.items()}


def digest(kept: dict[str, list[int]]) -> str:
    """The first 16 digits of a SHA-256 over the groups and units, in the groups' order."""
    text = "\n".join(f"{name}:{','.join(map(str, units))}" for name, units in kept.items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]
