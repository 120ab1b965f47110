"""The streamed pass on CUDA devices: the same bits wherever the weights are and by two processes, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hywia_kernels as hk
from tests.support.models import random_model
from tests.support.tokenizers import byte_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROOT = Path(__file__).parents[2]
SIZES = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16)
IDS = torch.randint(3, 256, (19, 64), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, tmp_path_factory):
    """A model of eight layers in bfloat16, of 25 MB each."""
    folder = tmp_path_factory.mktemp(request.param)
    fields = dict(SIZES, vocab_size=259, num_key_value_heads=8, head_dim=64, max_position_embeddings=128)
    model = random_model(request.param, **fields, bos_token_id=256, eos_token_id=257, pad_token_id=258)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40MB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def equal(one, other) -> bool:
    return all(
        all(torch.equal(fine, other.fine[g.name][order]) for order, fine in one.fine[g.name].items())
        and torch.equal(one.moments[g.name], other.moments[g.name])
        for g in one.groups
    )


def peak_of(place: str, folder: Path):
    """`(statistics, bytes allocated at the most beside what was there before)`."""
    if place == "files":
        model = hk.open_stored(folder)
    else:
        model, _ = hk.load(folder, device="cuda:0" if place == "device" else "cpu")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    statistics = hk.calibrate_streamed(model, IDS, device="cuda:0")
    assert statistics.record["weights"] == place
    return statistics, statistics.record["peak_bytes"] - before


def test_the_same_bits_wherever_the_weights_are(folder):
    whole = hk.calibrate(hk.load(folder, device="cuda:0")[0], IDS, memory="lean")
    made = {place: peak_of(place, folder) for place in ("device", "host", "files")}
    statistics, resident = made["device"]
    layer = 2 * sum(g.units * g.unit_parameters for g in statistics.groups if g.layer == 0)
    for place, (other, peak) in made.items():
        assert equal(statistics, other), place
        assert other.fingerprint == whole.fingerprint
        # Two layers, and what lies outside of the layers.
        assert peak <= resident + (0 if place == "device" else 2.6 * layer), place
    for group in statistics.groups:
        one, other = statistics.fine[group.name]["second"], whole.fine[group.name]["second"]
        assert float((one - other).abs().max()) < 0.02 * float(other.abs().max())  # bfloat16 activations


def test_weights_on_their_way_overlap_with_the_work(folder):
    """A sweep that waits for every layer, and one that does not, have the same bits."""
    from hywia_kernels.scale.slots import Slots

    real = Slots.sweep

    def waiting(self, order):
        for i in real(self, order):
            torch.cuda.synchronize()
            yield i
            torch.cuda.synchronize()

    model, _ = hk.load(folder, device="cpu")
    free = hk.calibrate_streamed(model, IDS, device="cuda:0")
    Slots.sweep = waiting
    try:
        strict = hk.calibrate_streamed(model, IDS, device="cuda:0")
    finally:
        Slots.sweep = real
    assert equal(free, strict)


def score(folder: Path, output: Path, processes: int, *more: str) -> dict:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    text = output.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 300)
    command = ["score", folder, "-o", output, "--calib", text, "--samples", "19", "--seq-len", "64", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "hywia_kernels", *map(str, command), "--json", str(output) + ".json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(Path(str(output) + ".json").read_text())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("order", ["second", "mixed"])
@pytest.mark.parametrize("place", ["device", "host", "files"])
def test_two_devices_give_the_bits_of_one(folder, place, order, tmp_path):
    how = ("--memory", "streamed", "--weights", place, "--order", order)
    records = [score(folder, tmp_path / str(n), n, *how)["scores"]["statistics"] for n in (1, 2)]
    assert [record["ranks"] for record in records] == [1, 2]
    assert equal(*(hk.load_scores(tmp_path / str(n))[1] for n in (1, 2)))
