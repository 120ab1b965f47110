"""Layers on their way through two buffers are the layers they were, and leave the model as it was."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.scale.slots import Slots
from hywia_kernels.scale.stored import FileWeights, Pinned
from hywia_kernels.scale.weights import tables
from tests.support.families import FAMILIES, fresh
from tests.support.tokenizers import byte_tokenizer

CPU = torch.device("cpu")
BOTH_WAYS = [0, 1, 2, 2, 1, 0]


@pytest.fixture(params=["llama", "gpt2", "mixtral"])
def pair(request, tmp_path):
    """A loaded model, and the same with its weights in files."""
    fresh(next(f for f in FAMILIES if f.name == request.param)).save_pretrained(tmp_path, max_shard_size="30KB")
    byte_tokenizer().save_pretrained(tmp_path)
    return hk.load(tmp_path)[0], hk.open_stored(tmp_path)


@pytest.mark.parametrize("place", ["host", "files"])
def test_each_layer_is_there_while_it_is_swept(pair, place):
    loaded, stored = pair
    model = loaded if place == "host" else stored.model
    expected = [
        [p.detach().clone() for p in table.originals] for table in tables(loaded, dict(loaded.named_modules()))[0]
    ]
    of_layers, _ = tables(model, dict(model.named_modules()))
    source = Pinned(of_layers, CPU) if place == "host" else FileWeights(stored)
    pointers, swept = set(), []
    with closing(Slots(of_layers, source, CPU, place)) as weights:
        for i in weights.sweep(BOTH_WAYS):
            held = [module._parameters[leaf] for owners in of_layers[i].owners for module, leaf in owners]
            assert all(torch.equal(a, b) for a, b in zip(held, expected[i], strict=True))
            assert not any(p.requires_grad for p in held)
            pointers.add(held[0].data_ptr())
            swept.append(i)
    assert swept == BOTH_WAYS
    assert len(pointers) == 2
    assert weights.moved == 2 * sum(table.bytes for table in of_layers)
    for table in of_layers:
        held = [module._parameters[leaf] for owners in table.owners for module, leaf in owners]
        assert all(a is b for a, b in zip(held, table.originals, strict=True))


def test_a_source_that_fails_leaves_the_model_as_it_was(pair):
    model, _ = pair
    of_layers, _ = tables(model, dict(model.named_modules()))

    class Failing(Pinned):
        def tensors(self, table):
            if table is of_layers[1]:
                raise OSError("the disk is gone")
            return super().tensors(table)

    weights = Slots(of_layers, Failing(of_layers, CPU), CPU, "host")
    with closing(weights), pytest.raises(OSError, match="the disk is gone"):
        list(weights.sweep([0, 1, 2]))
    for table in of_layers:
        held = [module._parameters[leaf] for owners in table.owners for module, leaf in owners]
        assert all(a is b for a, b in zip(held, table.originals, strict=True))
