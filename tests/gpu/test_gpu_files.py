"""Files to files with layers on a CUDA device, and models that accelerate spread over two of them."""

from __future__ import annotations

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.checkpoint.stored_model import open_stored
from hywia_kernels.engine import block
from tests.support.comparison import distance
from tests.support.cuts import make_plan
from tests.support.directories import contents
from tests.support.families import FAMILIES, fresh
from tests.support.models import random_model, sizes
from tests.support.tokenizers import write_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_refit_from_files_is_the_one_in_memory(family, tmp_path):
    fresh(family).save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    text = torch.randint(2, 131, (40, 14), generator=torch.Generator().manual_seed(5))
    model, tokenizer = hk.load(tmp_path / "in", device="cuda")
    plan = make_plan(model, "both")
    stored = open_stored(tmp_path / "in")
    after = hk.prune_files(stored, plan, tmp_path / "files", refit=text, ridge=1e-2, device="cuda")
    want = hk.reconstruct(model, plan, text, ridge=1e-2)
    hk.prune(model, want)
    hk.save(model, tokenizer, tmp_path / "memory", plan=want)
    errors = after.record["refit"]["relative_error"]
    assert errors.keys() == want.record["refit"]["relative_error"].keys()
    for name, (_, solved) in want.record["refit"]["relative_error"].items():
        assert errors[name][1] == pytest.approx(solved, rel=1e-4, abs=1e-6)
    assert contents(tmp_path / "files").keys() == contents(tmp_path / "memory").keys()
    cut, _ = hk.load(tmp_path / "files")
    for (name, got), other in zip(cut.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.cpu(), other.cpu(), rtol=1e-5, atol=1e-5 * float(other.abs().max()), msg=name)
    assert {p.device.type for p in stored.model.parameters()} == {"meta"}
    assert {b.device.type for b in stored.model.buffers()} <= {"cpu"}


def test_a_refit_takes_a_layer_s_memory(tmp_path):
    """Of eight layers not more than three are on the device, the equations of one matrix beside them."""
    model = random_model(**sizes(512, 1024, 2816, layers=8, heads=8, kv_heads=8)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    model, _ = hk.load(tmp_path / "in", device="cpu")  # `to` has rounded the rotary frequencies too
    plan = make_plan(model, "both")
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    equations = 4 * 3 * (2816**2) + 8 * 4 * (2816**2)  # float32 while they are added up, float64 while they are solved
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hk.prune_files(
        tmp_path / "in",
        plan,
        tmp_path / "out",
        refit=torch.randint(2, 131, (8, 64), generator=torch.Generator().manual_seed(5)),
        device="cuda",
    )
    assert torch.cuda.max_memory_allocated() - before < 3 * layer + equations < 8 * layer + equations


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("memory", ["fast", "lean", "layerwise"])
def test_a_model_over_two_devices_keeps_the_nodes(memory, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    ran = []
    right = block.Block.backward
    monkeypatch.setattr(block.Block, "backward", lambda self, *args: ran.append(self) or right(self, *args))
    model = random_model(**sizes(2048, 512, 1408, layers=4, heads=8, kv_heads=4), initializer_range=0.05)
    model = model.to("cuda", torch.bfloat16)
    tokens = torch.randint(0, 2048, (6, 64), generator=torch.Generator().manual_seed(1))
    want = hk.calibrate(model, tokens, memory=memory)
    alone = len(ran)
    assert alone >= 4
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    model = accelerate.dispatch_model(model, places | {f"model.layers.{i}": i // 2 for i in range(4)})
    got = hk.calibrate(model, tokens, memory=memory)
    assert len(ran) == 2 * alone
    assert {p.device.index for p in model.model.layers.parameters()} == {0, 1}
    assert distance(got, want) <= 1e-6
