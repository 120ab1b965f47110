"""LLM-Pruner's own scripts, run beside this project with only the import changed.

    git clone https://github.com/horseee/LLM-Pruner
    HYWIA_LLM_PRUNER=LLM-Pruner pytest tests/integrations/test_llm_pruner_repository.py

The repository needs sentencepiece itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_llm_pruner import SHAPE

HERE = Path(__file__).parent
REPOSITORY = os.environ.get("HYWIA_LLM_PRUNER", "")
TAYLORS = ("vectorize", "param_first", "param_second", "param_mix")
HEAD = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path(REPOSITORY) / "hf_prune.py").is_file() or not REPOSITORY,
        reason="HYWIA_LLM_PRUNER does not name a checkout of github.com/horseee/LLM-Pruner",
    ),
]


def run(folder, script, side, taylor):
    out = folder / f"{script}-{side}-{taylor}.pt"
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, HERE / "run_llm_pruner.py", Path(REPOSITORY).resolve(), script, side, taylor, out]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


def kept_rows(before, after):
    """Which rows of a matrix are left, in their order."""
    found = [(before == row).all(1).nonzero().flatten().tolist() for row in after]
    assert all(len(at) == 1 for at in found)
    return [at[0] for at in found]


@pytest.mark.parametrize("taylor", TAYLORS)
def test_multi_head_attention_keeps_the_same(tmp_path, taylor):
    theirs, ours = (run(tmp_path, "hf_prune.py", side, taylor) for side in ("theirs", "ours"))
    assert theirs["after"]["model.layers.1.self_attn.q_proj.weight"].shape == (32, 64)
    assert theirs["after"]["model.layers.2.mlp.up_proj.weight"].shape == (48, 64)
    assert theirs["after"].keys() == ours["after"].keys()
    for name, weight in theirs["after"].items():
        assert torch.equal(weight, ours["after"][name]), name


def right_kv_heads(run_, taylor):
    """Layer -> KV heads to keep, from plain gradients and every head's own queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = run_["ids"]
    config = LlamaConfig(vocab_size=40000, num_key_value_heads=2, attn_implementation="eager", **SHAPE)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(run_["before"])
    squares = {}
    for sample in ids:
        model.zero_grad()
        model(sample[None], labels=sample[None]).loss.backward()
        for name, p in model.named_parameters():
            squares[name] = squares.get(name, 0) + p.grad.double() ** 2 / len(ids)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    found = {}
    for i in (1, 2):
        total = 0
        for part, axis in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
            name = f"model.layers.{i}.self_attn.{part}.weight"
            p = model.get_parameter(name)
            w, g = p.detach().double(), p.grad.double()
            if taylor == "vectorize":
                values = (w * g).sum(1 - axis).abs()
            else:
                second = w * squares[name] * w
                term = {"param_first": w * g, "param_second": second, "param_mix": w * g - 0.5 * second}[taylor]
                values = term.abs().sum(1 - axis)
            total = total + values.view(2, -1).sum(1)
        found[i] = [int(total.argmax())]
    return found


@pytest.mark.parametrize("taylor", TAYLORS)
def test_grouped_query_attention_keeps_the_right_ones(tmp_path, taylor):
    ours = run(tmp_path, "llama3.py", "ours", taylor)
    for i, heads in right_kv_heads(ours, taylor).items():
        name = f"model.layers.{i}.self_attn.k_proj.weight"
        rows = kept_rows(ours["before"][name], ours["after"][name])
        assert rows == list(range(heads[0] * HEAD, heads[0] * HEAD + HEAD))
        query = f"model.layers.{i}.self_attn.q_proj.weight"
        served = kept_rows(ours["before"][query], ours["after"][query])
        assert served == list(range(heads[0] * 4 * HEAD, (heads[0] + 1) * 4 * HEAD))
