"""Weights go to their device one after the other: the host never holds all of them on the way."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.arch.facts import weight_bytes
from hywia_kernels.checkpoint import loading
from tests.support.tiny import TINY, fresh

META = torch.device("meta")  # a device that is not the CPU, on every machine


@pytest.fixture
def moved(monkeypatch):
    """Bytes that whole models held on the CPU when they were moved to the target, which is the meta device."""
    held = []
    real = torch.nn.Module.to

    def to(module, *arguments, **keywords):
        held.append(sum(p.numel() * p.element_size() for p in module.parameters() if p.device.type == "cpu"))
        return real(module, *arguments, **keywords)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(loading, "device_named", lambda device: META)
    return held


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers needs accelerate for it")
def test_nothing_is_left_to_move(saved, moved):
    model, _ = hk.load(saved)
    assert {p.device for p in model.parameters()} == {META}
    assert sum(moved) == 0
    assert [n for n, m in model.named_modules() if hasattr(m, "_hf_hook")] == []


def test_without_accelerate_the_model_is_moved(saved, moved, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else real(name, *a))
    model, _ = hk.load(saved)
    assert {p.device for p in model.parameters()} == {META}
    assert moved[-1] == weight_bytes(fresh(TINY[2]))


def test_on_the_cpu_nothing_is_asked_of_accelerate(saved, monkeypatch):
    from transformers import LlamaForCausalLM

    asked = []
    real = LlamaForCausalLM.from_pretrained.__func__

    def from_pretrained(cls, *arguments, **keywords):
        asked.append(keywords.get("device_map"))
        return real(cls, *arguments, **keywords)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))
    model, _ = hk.load(saved, device="cpu")
    assert asked == [None]
    assert {p.device.type for p in model.parameters()} == {"cpu"}
