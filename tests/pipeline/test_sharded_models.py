"""Models that torch really shards or wraps: by name, with the way out, or as the model inside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.processes import run_python

SHARDED = r"mlp\.gate_proj\.weight: expected a whole weight, got a DTensor, .* without tp_plan, fully_shard or ZeRO"
REFUSED = {
    "fully_sharded": SHARDED.replace("mlp", r"model\.layers\.0\.self_attn", 1).replace("gate", "q"),
    "tensor_parallel": SHARDED,
    "fsdp": r"^model: expected the model itself, got it in FullyShardedDataParallel; .* before it is sharded",
    "described": r"embed_tokens\.weight: expected weights with values, got them on the meta device; load the model's",
    "checkpointed": r"^model\.layers\.1: .* got it in CheckpointWrapper; put its _checkpoint_wrapped_module there",
}
CHANGES = ("reconstruct", "prune")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    script = Path(__file__).with_name("sharded_models.py")
    return json.loads(run_python(script, tmp_path_factory.mktemp("sharded"), OMP_NUM_THREADS="1").splitlines()[-1])


@pytest.mark.parametrize("kind", REFUSED)
def test_every_function_refuses_it_by_name(kind, said):
    assert set(said[kind]) == {"calibrate", "head_residuals", "reconstruct", "prune", "save"}
    assert [name for name, message in said[kind].items() if not re.search(REFUSED[kind], message)] == []


def test_a_wrapper_that_holds_the_model_is_looked_into(said):
    assert set(said["compiled"].values()) == {""}
    assert {name for name, message in said["distributed"].items() if message} == set(CHANGES)
    assert all("pass model.module, and wrap the result again" in said["distributed"][name] for name in CHANGES)
