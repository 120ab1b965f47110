"""A model whose weights stay in their files is the loaded one, and takes little memory."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.scale.job import calibrate_streamed
from tests.support.families import FAMILIES, fresh
from tests.support.processes import run_python
from tests.support.tokenizers import byte_tokenizer

IDS = torch.randint(2, 131, (9, 13), generator=torch.Generator().manual_seed(11))


def stored(family, folder):
    """A family's tiny model in several files."""
    fresh(family).save_pretrained(folder, max_shard_size="30KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def equal(one, other) -> bool:
    return all(
        torch.equal(one.fine[g.name]["second"], other.fine[g.name]["second"])
        and torch.equal(one.moments[g.name], other.moments[g.name])
        for g in one.groups
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_same_statistics_wherever_the_weights_are(family, tmp_path):
    stored(family, tmp_path)
    before = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()}
    loaded, _ = hk.load(tmp_path)
    mapped = hk.open_stored(tmp_path)
    by_place = {
        "device": calibrate_streamed(loaded, IDS),
        "host": calibrate_streamed(loaded, IDS, weights="host"),
        "files": calibrate_streamed(mapped, IDS),
    }
    whole = hk.calibrate(loaded, IDS[:2])
    for place, statistics in by_place.items():
        assert statistics.record["weights"] == place
        assert (statistics.fingerprint, statistics.parameters) == (whole.fingerprint, whole.parameters)
        assert equal(statistics, by_place["device"])
    layers = mapped.model.get_submodule(family.layers)
    assert all(p.is_meta for p in mapped.model.parameters())  # as it was before
    assert by_place["files"].record["bytes_moved"] == 2 * sum(p.nbytes for p in layers.parameters())
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()} == before


def test_a_stored_model_is_held_by_the_host(tmp_path):
    stored(FAMILIES[4], tmp_path)
    loaded, _ = hk.load(tmp_path)
    one, other = calibrate_streamed(loaded, IDS), calibrate_streamed(hk.open_stored(tmp_path), IDS, weights="host")
    assert other.record["weights"] == "host"
    assert equal(one, other)
    with pytest.raises(hk.UsageError, match="weights: expected auto, host or files for a stored model, got 'device'"):
        calibrate_streamed(hk.open_stored(tmp_path), IDS, weights="device")


def test_another_dtype_is_that_of_loading(tmp_path):
    stored(FAMILIES[4], tmp_path)
    loaded, _ = hk.load(tmp_path, dtype="bfloat16")
    one, other = calibrate_streamed(loaded, IDS), calibrate_streamed(hk.open_stored(tmp_path, dtype="bfloat16"), IDS)
    assert (other.record["dtype"], other.fingerprint) == ("bfloat16", one.fingerprint)
    assert equal(one, other)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    stored(FAMILIES[4], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(hk.HywiaError, match=r"mlp.*44, 36.*40, 36|40, 36.*44, 36"):
        hk.open_stored(tmp_path)


MEASURED = """
import json, sys, threading, time
import torch
torch.set_num_threads(1)
from hywia_kernels.scale.job import calibrate_streamed
from hywia_kernels.checkpoint.stored_model import open_stored

def resident():
    lines = (line.split() for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssFile")))
    return sum(int(line[1]) * 1024 for line in lines)

class Watch(threading.Thread):
    peak, over = 0, False
    def run(self):
        while not self.over:
            self.peak = max(self.peak, resident())
            time.sleep(0.002)

stored = open_stored(sys.argv[1])
model = stored.model
layer = sum(p.nbytes for p in model.model.layers[0].parameters())
ids = torch.randint(2, 131, (8, 16), generator=torch.Generator().manual_seed(1))
calibrate_streamed(stored, ids[:1], backend=sys.argv[2])  # libraries are loaded, and kernels made
before, watch = resident(), Watch(daemon=True)
watch.start()
calibrate_streamed(stored, ids, backend=sys.argv[2])
watch.over = True
watch.join()
print(json.dumps({"layer": layer, "layers": len(model.model.layers), "took": watch.peak - before}))
"""


@pytest.mark.slow
def test_a_mapped_model_takes_less_than_three_layers(tmp_path):
    """Of memory that is the process's own and of pages of the files that are in its use, together."""
    config = dict(vocab_size=131, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8)
    from tests.support.models import random_model

    random_model("llama", **config, num_key_value_heads=4, max_position_embeddings=64).save_pretrained(
        tmp_path / "model", max_shard_size="40MB"
    )
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "measure.py").write_text(MEASURED)
    found = json.loads(run_python(tmp_path / "measure.py", tmp_path / "model", "native").splitlines()[-1])
    assert found["layers"] == 8
    assert 1.0 < found["took"] / found["layer"] < 3.0
