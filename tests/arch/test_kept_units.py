"""Entries that were made by hand keep the units that they kept before entries were derived from structure."""

from __future__ import annotations

import pytest

from hywia_kernels import arch
from tests.support.kept_units import digest, kept_units, names

COMMIT = "d35290a"  # the last one before derived entries were merged
# Family -> request -> digest of the kept units, as that commit gave it: `support/kept_units.py` ran beside its copy
# of the package. Gemma 4's entries came later. Qwen3-MoE's widths differ by layer, which a ratio refuses in both.
KEPT = {
    "llama": {
        "group_ratio": "6de3b04b38317e36",
        "ratio": "7ee461768fcc84eb",
        "magnitude": "f0146e28a2ac6c51",
    },
    "llama-bias": {
        "group_ratio": "0f554159778a782f",
        "ratio": "144708d458566a44",
        "magnitude": "22959e0eb9fed9ef",
    },
    "mistral": {
        "group_ratio": "bd1de18ca93132c2",
        "ratio": "cac108f74ece6989",
        "magnitude": "f0146e28a2ac6c51",
    },
    "qwen2": {
        "group_ratio": "2a6ffd946c5103ef",
        "ratio": "9203003319d2b449",
        "magnitude": "d6ae8d5c983dfa78",
    },
    "qwen3": {
        "group_ratio": "b92610eba0dfaa92",
        "ratio": "b4eb7d55e734d64a",
        "magnitude": "b6468d9ecef08016",
    },
    "gemma": {
        "group_ratio": "660b39bc14351e30",
        "ratio": "26291b15c85f9589",
        "magnitude": "f0146e28a2ac6c51",
    },
    "granite": {
        "group_ratio": "bb30849c9b685cf9",
        "ratio": "f61b01ef4e0e2be1",
        "magnitude": "bffb8c20f70f3f0f",
    },
    "gemma2": {
        "group_ratio": "36283f6e89fecc02",
        "ratio": "87fb2094d1dfad9d",
        "magnitude": "2af5fa3f538e9937",
    },
    "gemma3_text": {
        "group_ratio": "9dddd85e4959d010",
        "ratio": "e7bb0462b8c5f7f5",
        "magnitude": "32b4d70a4c7e7642",
    },
    "gemma3": {
        "group_ratio": "9940ff9749359455",
        "ratio": "a411ae69382bd417",
        "magnitude": "26b1161b60fbe24b",
    },
    "olmo2": {
        "group_ratio": "5f0a98432d69513b",
        "ratio": "29d2d77d4305801c",
        "magnitude": "73636bca822d9975",
    },
    "olmo3": {
        "group_ratio": "e4fca4df52aa8737",
        "ratio": "dadd84ceaa7e7b13",
        "magnitude": "73636bca822d9975",
    },
    "smollm3": {
        "group_ratio": "58411288ae551a30",
        "ratio": "acbcbec176cdd273",
        "magnitude": "25a9ff4d2a685b2c",
    },
    "phi": {
        "group_ratio": "d98a38c06c9201e0",
        "ratio": "5d37bc96bc8ebb5e",
        "magnitude": "6bf9e20cf5dbf4a5",
    },
    "phi3": {
        "group_ratio": "59adbfd5ca0e88a8",
        "ratio": "69ac8d3b52829ac5",
        "magnitude": "15c144d17da1e02e",
    },
    "phi3-longrope": {
        "group_ratio": "508d15179f151e6c",
        "ratio": "d804b79bc47cd94d",
        "magnitude": "15c144d17da1e02e",
    },
    "starcoder2": {
        "group_ratio": "d9c7f93510618c35",
        "ratio": "32df3d667ad793fa",
        "magnitude": "bb4bcdca0f0576b5",
    },
    "gpt_neox": {
        "group_ratio": "5a7161e6d1ba1335",
        "ratio": "0b12c9040293a0f3",
        "magnitude": "8b3a163f7746c3eb",
    },
    "gpt_neox-sequential": {
        "group_ratio": "8c093736570e5f05",
        "ratio": "52412b5400e3a1ad",
        "magnitude": "451a4ea8fd1c54a9",
    },
    "opt": {
        "group_ratio": "54778fe243a7ac9a",
        "ratio": "07da7a7a858fc3a0",
        "magnitude": "cf83c8f58f17c9a9",
    },
    "opt-350m": {
        "group_ratio": "e3f75beb4f67af98",
        "ratio": "b25c9c36e6087125",
        "magnitude": "4e925e3937256562",
    },
    "gpt2": {
        "group_ratio": "f4544be796c090c4",
        "ratio": "84d93621759aa705",
        "magnitude": "9e7608de141ca244",
    },
    "bloom": {
        "group_ratio": "c76944e26c5ba3e2",
        "ratio": "f150dc3f53a6205c",
        "magnitude": "371ff57093f06ed6",
    },
    "mixtral": {
        "group_ratio": "5ece48118e1902aa",
        "ratio": "370fe24ecd840422",
        "magnitude": "ad090c177a30e6c6",
        "experts": "7691b8286fc65fc2",
    },
    "qwen3_moe": {
        "group_ratio": "2bfb060c4f566ed6",
        "magnitude": "22c203ef1a5f589d",
        "experts": "9757460bfc2a11c7",
    },
    "baichuan": {
        "group_ratio": "9339ecab3ad80d06",
        "ratio": "99c877a9a32a5dc5",
        "magnitude": "1817c5091c93f487",
    },
}
LATER = {"gemma4", "gemma4_text"}


def test_every_entry_made_by_hand_is_compared():
    assert set(names()) - set(KEPT) == LATER
    types = {t for entry in arch.TABLE for t in entry.model_types}
    assert types - {name.partition("-")[0] for name in KEPT} == LATER


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        pytest.param(name, request, marks=[pytest.mark.slow] if request == "ratio" else [], id=f"{name}-{request}")
        for name, requests in KEPT.items()
        for request in requests
    ],
)
def test_the_same_units_stay(name, request_):
    """`ratio` tries several plans, so it is among the slow ones."""
    assert digest(kept_units(name, request_)) == KEPT[name][request_], f"other units than at {COMMIT}"
