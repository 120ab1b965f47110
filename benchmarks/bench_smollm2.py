"""SmolLM2-135M on a CPU, dense and with 20 % and 50 % of its parameters removed: `python -m benchmarks.bench_smollm2`.

Which units go does not change the speed, so weights' magnitude ranks them. All models are timed in turn, run by run, so
that what else the machine does hits them alike; `--clock process` counts the process's own time, for a machine that is
not quiet (it still sees its neighbours' use of memory). Layers compiled, a static cache, one thread by default.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch

import hywia_kernels as hk
from hywia_kernels.planning import plan_for
from hywia_kernels.speed import Case, work_of
from hywia_kernels.speed.driver import StaticDriver

from .bench_pruned import ideal
from .environment import device_name

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def prepare(ratio: float, context: int):
    """`(name, work, phase -> call)` of a model with that share of its parameters removed."""
    model, _ = hk.load("smollm2", device="cpu")
    name = "dense"
    if ratio:
        plan = plan_for(hk.score(model, criterion="magnitude"), target="cpu", ratio=ratio)
        hk.prune(model, plan)
        name = f"{plan.ratio:.1%}: {plan.widths('attention')[0]} KV groups x {plan.widths('mlp')[0]}"
    driver = StaticDriver(model, 1, context, compile=True)
    prompt, token = torch.arange(context)[None], torch.zeros((1, 1), dtype=torch.int64)
    last = torch.tensor([context - 1])
    return name, work_of(model), {"prefill": lambda: driver.prefill(prompt), "decode": lambda: driver.step(token, last)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_smollm2", description=__doc__.split("\n")[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    clock = CLOCKS[given.clock]
    found = [prepare(ratio, given.context) for ratio in (0.0, *given.ratios)]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(found))
    calls = {(name, phase): call for name, _, phases in found for phase, call in phases.items()}
    for call in calls.values():
        call()
        call()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        for run in range(given.runs):
            for key, call in calls.items():
                if key[1] == "decode" or run % 3 == 0:  # a prompt takes as long as many steps
                    began = clock()
                    call()
                    times[key].append(clock() - began)
    device = device_name(torch.device("cpu"))
    print(f"{device}, {given.threads} threads, torch {torch.__version__}, {given.clock} clock, context {given.context}")
    for phase in ("prefill", "decode"):
        tokens = given.context if phase == "prefill" else 1
        first = statistics.median(times[found[0][0], phase])
        for name, work, _ in found:
            median = statistics.median(times[name, phase])
            best = ideal(Case(phase, 1, given.context), found[0][1], work)
            print(
                f"{phase:<8}{name:<28}{median * 1e3:9.2f} ms {tokens / median:9.1f} tokens/s  x{first / median:.3f}  "
                f"ideal x{best:.3f}  share {first / median / best:.3f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
