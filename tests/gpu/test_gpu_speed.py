"""The static driver on a GPU: captured and compiled steps give the model's logits."""

from __future__ import annotations

import pytest
import torch

from hywia_kernels.deploy.speed import Case, measure
from hywia_kernels.engine.static_driver import StaticDriver, capture, drivable

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().cuda()


@pytest.mark.parametrize("compile", [False, True])
def test_captured_steps_give_the_models_logits(model, compile):
    assert drivable(model) is None
    ids = torch.randint(0, 259, (2, 100), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        want = model(ids).logits[:, -1]
    torch._dynamo.reset()
    driver = StaticDriver(model, 2, 100, compile=compile)
    prefill = capture(lambda: driver.prefill(ids))
    torch.testing.assert_close(prefill(), want, rtol=1e-3, atol=1e-3)
    step = capture(lambda: driver.step(ids[:, -1:], torch.full((1,), 99, device="cuda")))
    torch.testing.assert_close(step(), want, rtol=1e-3, atol=1e-3)


def test_figures_have_a_peak(model):
    figures, reason = measure(model, [Case("decode", 1, 64)], modes=("eager", "captured"), runs=3)
    assert reason is None
    held = sum(p.nbytes for p in model.parameters())
    assert all(f.peak_bytes >= held for f in figures)
