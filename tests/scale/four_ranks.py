"""Run by torchrun in four processes: statistics by one, two and four of them, and what they say of what is wrong.

Rank 0 writes what came of it, as JSON, into the file that is named.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import distributed as dist

import hywia_kernels as hk
from hywia_kernels.scale import ranks as ranks_module
from hywia_kernels.scale.job import calibrate_streamed
from hywia_kernels.scale.ranks import Ranks
from hywia_kernels.scale.weights import tables
from hywia_kernels.scale.work import Work
from tests.support.families import fresh_named
from tests.support.tokenizers import byte_tokenizer

FAMILIES = ("llama", "qwen3", "gpt2", "mixtral")
SIZES = (1, 2, 4)
SECOND, FIRST = ("second",), ("first",)


def texts() -> dict[str, list[torch.Tensor]]:
    """Sets of token ids: as many runs for every rank, lengths and numbers that fit nothing, fewer runs than ranks."""
    ids = torch.randint(2, 131, (16, 13), generator=torch.Generator().manual_seed(11))
    return {"equal": list(ids), "ragged": [row[: 4 + i % 9] for i, row in enumerate(ids[:11])], "few": list(ids[:3])}


def digest(statistics) -> str:
    """Of all bits of the statistics."""
    found = hashlib.sha256(f"{statistics.fingerprint} {statistics.parameters} {statistics.record['loss']!r}".encode())
    for group in statistics.groups:
        for tensor in (*statistics.fine[group.name].values(), statistics.moments[group.name]):
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def against_calibrate(model, ids, statistics) -> dict:
    """How far the statistics are from those of `calibrate`, and whether the same units go."""
    orders = statistics.orders
    whole = hk.calibrate(model, ids, memory="lean")
    worst = 0.0
    for group in whole.groups:
        coarse = whole.coarse[group.name].double()
        moments = torch.stack([coarse.mean(1), coarse.square().mean(1)])
        fine = whole.fine[group.name]
        worst = max(worst, *(relative(statistics.fine[group.name][order], fine[order]) for order in orders))
        worst = max(worst, relative(statistics.moments[group.name], moments))
    kept = []
    for ratio in (0.2, 0.5):
        for order in orders:
            plans = [hk.plan(hk.fuse(s, order=order), group_ratio=ratio) for s in (statistics, whole)]
            kept.append(all(torch.equal(plans[0].keep[g.name], plans[1].keep[g.name]) for g in whole.groups))
    return {
        "worst": worst,
        "same units": all(kept),
        "orders": list(orders),
        "same facts": [statistics.fingerprint, statistics.parameters] == [whole.fingerprint, whole.parameters],
    }


class Spoiled(torch.autograd.Function):
    """Numbers as they are, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, values):
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class Stopped(Exception):
    pass


def stopping(after: int):
    """A stand-in for `Work.keep_state` that ends the run when a layer is finished."""
    keep = Work.keep_state

    def stop(self, layer, gradients, facts):
        keep(self, layer, gradients, facts)
        if layer == after:
            raise Stopped

    return stop


class Launch:
    """The four processes, and parts of them that work together."""

    def __init__(self) -> None:
        self.store, self.rank, self.size = next(dist.rendezvous("env://"))
        group = dist.PrefixStore("group", self.store)
        dist.init_process_group("gloo", store=group, rank=self.rank, world_size=self.size)
        self.groups = {size: dist.new_group(list(range(size))) for size in SIZES}
        self.count = 0

    def ranks(self, size: int, timeout: float = 60.0) -> Ranks | None:
        """The first `size` processes; None on the others."""
        self.count += 1
        if self.rank >= size:
            return None
        store = dist.PrefixStore(f"case{self.count}", self.store)
        return Ranks(self.rank, size, store=store, group=self.groups[size], timeout=timeout)

    def all_of(self, value):
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def same_bits(launch: Launch) -> dict:
    cases = [(name, kind, ("second",)) for name in FAMILIES for kind in texts()]
    cases += [(name, kind, hk.settings.ORDERS) for name in FAMILIES for kind in ("ragged", "few")]
    cases += [("llama", "equal", ("first",)), ("gpt2", "equal", ("mixed",)), ("mixtral", "equal", ("first", "mixed"))]
    found: dict = {}
    for name, kind, orders in cases:
        model, ids, by_size = fresh_named(name), texts()[kind], {}
        record: dict = {}
        for size in SIZES:
            ranks = launch.ranks(size)
            if ranks is not None:
                statistics = calibrate_streamed(model, ids, orders=orders, ranks=ranks)
                by_size[size], record = digest(statistics), statistics.record
            by_size[size] = sorted({d for d in launch.all_of(by_size.get(size)) if d is not None})
        case = f"{name} {kind} {' '.join(orders)}"
        found[case] = {"bits": by_size, "runs": record["runs"], "exchanged": record["bytes_exchanged"]}
        if launch.rank == 0:
            found[case] |= against_calibrate(model, ids, statistics)
    return found


def held_together(launch: Launch, folder: Path) -> dict:
    """Stored models of which the processes of a host hold a part each: all four on one, and two on each of two."""
    found: dict = {}
    real = ranks_module._place
    for name, kind, orders in (("llama", "few", SECOND), ("gpt2", "ragged", SECOND), ("mixtral", "equal", FIRST)):
        ids = texts()[kind]
        if launch.rank == 0:
            fresh_named(name).save_pretrained(folder / name, max_shard_size="30KB")
            byte_tokenizer().save_pretrained(folder / name)
        launch.all_of(None)
        stored = hk.open_stored(folder / name)
        alone = calibrate_streamed(fresh_named(name), ids, orders=orders)
        of: dict = {"alone": digest(alone)}
        for hosts in (1, 2):
            ranks_module._place = lambda hosts=hosts: f"host {launch.rank * hosts // launch.size}"
            try:
                statistics = calibrate_streamed(
                    stored, ids, orders=orders, weights="host", ranks=launch.ranks(launch.size)
                )
            finally:
                ranks_module._place = real
            record = statistics.record
            of[f"{hosts}"] = launch.all_of([digest(statistics), record["weights"], record["bytes_moved"]])
        of["layers"] = 2 * layer_bytes(stored.model)
        of["meta"] = all(p.is_meta for p in stored.model.parameters())
        found[name] = of
    return found


def layer_bytes(model) -> int:
    of_layers, _ = tables(model, dict(model.named_modules()))
    return sum(table.bytes for table in of_layers)


def resumed(launch: Launch, folder: Path) -> dict:
    """A scoring that is stopped when two of three layers are finished, and goes on with another number of processes."""
    found, keep = {}, Work.keep_state
    model, ids = fresh_named("llama"), texts()["ragged"]
    for stopped_with, resumed_with, orders in ((1, 4, SECOND), (4, 2, SECOND), (2, 1, SECOND), (4, 2, FIRST)):
        case = f"{stopped_with}-{resumed_with} {orders[0]}"
        work = folder / case
        ranks = launch.ranks(stopped_with)
        if ranks is not None:
            Work.keep_state = stopping(1)
            try:
                calibrate_streamed(model, ids, orders=orders, ranks=ranks, work=work, every=0.0)
            except Stopped:
                found[case] = {"kept": sorted(p.name for p in work.iterdir())}
            finally:
                Work.keep_state = keep
        launch.all_of(None)
        ranks = launch.ranks(resumed_with)
        if ranks is not None:
            statistics = calibrate_streamed(model, ids, orders=orders, ranks=ranks, work=work, every=0.0)
            if launch.rank == 0:
                found[case] |= {
                    "bits": digest(statistics),
                    "from": statistics.record["resumed_at"],
                    "left": work.exists(),
                }
        launch.all_of(None)
    return found


def errors(launch: Launch) -> dict:
    """What every process raises: of different requests, texts and models, and of NaN on one of them."""
    last = launch.rank == launch.size - 1
    model, ids = fresh_named("qwen3"), texts()["equal"]
    other = [row.clone() for row in ids]
    other[5][3] += 1
    changed = fresh_named("qwen3")
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 4] += 1.0
    broken, odd = fresh_named("qwen3"), [row.clone() for row in ids]
    odd[15][:] = 130  # the last run, which the last rank has
    for row in odd[:15]:
        row[row == 130] = 129
    spoiled = fresh_named("qwen3")
    if last:
        spoiled.model.layers[1].mlp.register_forward_hook(lambda module, given, out: Spoiled.apply(out))
    with torch.no_grad():
        broken.get_input_embeddings().weight[130] = float("inf")
    cases = {
        "recipe": (model, ids, {"asked": {"recipe": "b" if last else "a"}}),
        "tokens": (model, other if last else ids, {}),
        "weights": (changed if last else model, ids, {}),
        "nan": (broken, odd, {}),
        "orders": (model, ids, {"orders": FIRST if last else SECOND}),
        "nan second": (spoiled, ids, {}),
        "nan first": (spoiled, ids, {"orders": FIRST}),
    }
    found = {}
    for name, (of, text, more) in cases.items():
        try:
            calibrate_streamed(of, text, ranks=launch.ranks(launch.size), **more)
            said = "nothing"
        except hk.HywiaError as error:
            said = str(error)
        found[name] = launch.all_of(said)
    return found


def hung(launch: Launch) -> list[str]:
    """What the others say when one does not come."""
    ranks = launch.ranks(launch.size, timeout=3.0)
    said = "nothing"
    if launch.rank != 2:
        try:
            ranks.meet("layer 7")
        except hk.HywiaError as error:
            said = str(error)
    return launch.all_of(said)


def failed(launch: Launch) -> list[list]:
    """What the others raise when one fails, and who is to tell it."""
    ranks = launch.ranks(launch.size)
    try:
        if launch.rank == 1:
            raise hk.HywiaError("out of everything")
        ranks.meet("layer 7")
        error = None
    except hk.HywiaError as raised:
        error = raised
    return launch.all_of([str(error), ranks.fail(error)])


def main(into: str) -> None:
    torch.set_num_threads(1)
    launch = Launch()
    folder = launch.all_of(tempfile.mkdtemp(dir=Path(into).parent) if launch.rank == 0 else None)[0]
    found = {
        "bits": same_bits(launch),
        "held together": held_together(launch, Path(folder)),
        "resumed": resumed(launch, Path(folder)),
        "undisturbed": {
            orders[0]: digest(calibrate_streamed(fresh_named("llama"), texts()["ragged"], orders=orders))
            for orders in (SECOND, FIRST)
        },
        "errors": errors(launch),
        "hung": hung(launch),
        "failed": failed(launch),
    }
    if launch.rank == 0:
        Path(into).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
