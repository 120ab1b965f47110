"""The fingerprint on a GPU: it never reads what queued work still writes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hywia_kernels.arch.facts import fingerprint, fingerprint_and_count_after, queued

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_weights_that_queued_work_writes_are_read_after_it():
    layer = nn.Linear(2048, 2048, device="cuda")
    want = nn.Linear(2048, 2048)
    new = want.weight.detach().cuda(), want.bias.detach().cuda()
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)  # a quarter of a second or so
    with torch.no_grad():
        layer.weight.copy_(new[0])
        layer.bias.copy_(new[1])
    events = queued([torch.device("cuda", torch.cuda.current_device())])
    assert not torch.cuda.current_stream().query(), "the write should still be queued"
    assert fingerprint_and_count_after(events, layer)[0] == fingerprint(want)


def test_devices_and_dtypes_have_the_same():
    layer = nn.Sequential(nn.Linear(300, 500), nn.LayerNorm(500)).bfloat16()
    layer.register_buffer("table", torch.arange(7) * 100_000)
    layer.register_buffer("scale", torch.rand(5))
    want = fingerprint(layer)
    assert fingerprint(layer.cuda()) == want
    layer[0].float()
    assert fingerprint(layer) == want
