"""Prints, as JSON, what the package says of models that torch really shards or wraps, in a process group of one."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.method.head_residual import head_residuals
from tests.support.tiny import TINY, fresh, make_plan

TOKENS = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(7))


def fully_sharded(model, folder):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return model


def tensor_parallel(model, folder):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"mlp.up_proj": ColwiseParallel(), "mlp.gate_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, init_device_mesh("cpu", (1,)), plan)
    return model


def fsdp(model, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def distributed(model, folder):
    return torch.nn.parallel.DistributedDataParallel(model)


def compiled(model, folder):
    return torch.compile(model, backend="eager")


def described(model, folder):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(model.config)


def checkpointed(model, folder):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    return model


MODELS = (fully_sharded, tensor_parallel, fsdp, distributed, compiled, described, checkpointed)


def outcomes(build, folder: Path) -> dict[str, str]:
    """What each function says; "" where it does the work."""
    plan, said = make_plan(fresh(TINY[2]), "both"), {}
    works = {
        "calibrate": lambda model: hk.calibrate(model, TOKENS),
        "head_residuals": lambda model: head_residuals(model, TOKENS),
        "reconstruct": lambda model: hk.reconstruct(model, plan, TOKENS),
        "prune": lambda model: hk.prune(model, plan),
        "save": lambda model: hk.save(model, None, folder / build.__name__),
    }
    for name, work in works.items():
        model = build(fresh(TINY[2]), folder)
        try:
            work(model)
            said[name] = ""
        except HywiaError as error:
            said[name] = str(error)
    return said


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(json.dumps({build.__name__: outcomes(build, folder) for build in MODELS}))
    dist.destroy_process_group()


main(Path(sys.argv[1]))
