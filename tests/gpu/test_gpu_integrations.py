"""Row and column sums from one kernel, and scorers of other tools, on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hywia_kernels import ops
from hywia_kernels.ops import reference
from hywia_kernels.ops.checks import ORDERS
from tests.support.operands import bits, matrix
from tests.support.tolerances import TAYLOR, error, magnitude

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("backend", [None, "triton", "cuda"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtypes", [(BF16, BF16, F32), (F16, F16, F32), (F32, F32, F32)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (37, 203), (4096, 1000), (1000, 11008)], ids=str)
def test_both_axes(shape, dtypes, order, backend):
    weight, grad, fisher = (matrix(shape, d, "contiguous", i, "cuda") for i, d in enumerate(dtypes))
    given = (weight, None if order == "second" else grad, None if order == "first" else fisher.abs())
    got = ops.taylor_importance_both(*given, order=order, backend=backend)
    again = ops.taylor_importance_both(*given, order=order, backend=backend)
    for axis in (0, 1):
        want, scale = (f(*given, axis, order, 1) for f in (reference.taylor_importance_fp64, magnitude))
        for out, repeated, ref in zip(got[axis], again[axis], want, strict=True):
            assert error(out, ref, scale) <= TAYLOR[dtypes[0]]
            assert torch.equal(bits(out), bits(repeated))


def test_torch_pruning_scores_as_on_the_cpu():
    tp = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    from hywia_kernels.integrations import torch_pruning as importance
    from tests.support.nets import Convolutions

    torch.manual_seed(0)
    model, images = Convolutions().eval(), torch.randn(4, 3, 8, 8)
    graph = tp.DependencyGraph().build_dependency(model, images)
    model(images).square().mean().backward()
    scorers = [
        getattr(importance, name)(group_reduction=reduction)
        for name in ("MagnitudeImportance", "TaylorImportance")
        for reduction in ("mean", "max", "prod")
    ]
    on_cpu = [scorer(group) for group in graph.get_all_groups() for scorer in scorers]
    model.cuda()  # the parameters are the same objects, elsewhere
    on_gpu = [scorer(group) for group in graph.get_all_groups() for scorer in scorers]
    assert len(on_gpu) == len(on_cpu) > 0
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert b.device.type == "cuda"
        torch.testing.assert_close(b.cpu(), a, rtol=2e-5, atol=1e-6)


def test_a_changed_device_is_seen():
    linear = nn.Linear(8, 8)
    from hywia_kernels.integrations.modules import SumsCache, magnitude_sums

    cache = SumsCache()
    cache.get(linear, (linear.weight,), lambda: magnitude_sums(linear, linear.weight, 2, None))
    linear.cuda()
    there = cache.get(linear, (linear.weight,), lambda: magnitude_sums(linear, linear.weight, 2, None))
    assert cache.reads == 2
    assert there["out"].fine.device.type == "cuda"
