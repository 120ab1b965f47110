"""The reconstruction from files to files: each layer is read, refitted, cut and written before the next one is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch
from ..checkpoint.stored_model import StoredModel
from ..checkpoint.stored_parameters import Bundle, read_ahead
from ..engine.passes import apart
from ..engine.samples import padded
from ..errors import HywiaError
from ..types import Plan
from .file_cut import FileCut
from .layer_runs import Weights
from .layer_targets import Journal, Run
from .reconstruction import check_passes, check_ridge, refitted, through_layers

__all__ = ["StoredWeights", "refitted_into"]


class StoredWeights(Weights):
    """Layers of a stored model that have their weights only while they are asked for; the files are read ahead.

    Args:
        stored: the model. bundles: of it, none of which is about two layers. device: where the layers run.

    Attributes:
        checksums: of all parameters that were at hand so far, as they are stored.
    """

    def __init__(self, stored: StoredModel, bundles: Sequence[Bundle], device: torch.device) -> None:
        self.devices, self._stored, self._device = [device], stored, device
        self.checksums: dict[str, int] = {}
        path = f"{arch.architecture(stored.model).layers}."
        self._layers: dict[int, list[Bundle]] = {}
        self.others: list[Bundle] = []
        for bundle in bundles:
            inside = {_place(name, path) for name in bundle.targets}
            if len(inside) > 1:
                raise HywiaError(
                    "model: its files hold parameters of several layers together, so that it cannot be reconstructed "
                    "from files; load it into memory, or leave the reconstruction out"
                )
            (place,) = inside
            (self.others if place is None else self._layers.setdefault(place, [])).append(bundle)

    @contextmanager
    def running(self) -> Iterator[StoredWeights]:
        """While the passes run, buffers are on the device."""
        modules = [m for m in self._stored.model.modules() if m._buffers]
        before = [(m, dict(m._buffers)) for m in modules]
        try:
            for module in modules:
                for leaf, buffer in module._buffers.items():
                    module._buffers[leaf] = None if buffer is None else buffer.to(self._device)
            yield self
        finally:
            for module, buffers in before:
                module._buffers.update(buffers)

    def entrance(self) -> Any:
        decoder = {id(p) for p in arch.decoder(self._stored.model).parameters()}
        state = self._stored.model.state_dict(keep_vars=True)
        before = [b for b in self.others if any(id(state.get(name)) in decoder for name in b.targets)]
        return self._held([*before, *self._layers.get(0, ())])

    def of(self, layers: Sequence[int]) -> Any:
        read_ahead(self._layers.get(max(layers) + 1, ()))
        return self._held([bundle for layer in layers for bundle in self._layers.get(layer, ())])

    @contextmanager
    def _held(self, bundles: Sequence[Bundle]) -> Iterator[None]:
        model, names = self._stored.model, self._stored.names
        before: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            parameters: dict[str, nn.Parameter] = {}
            for bundle in bundles:
                read = self._stored.read(bundle)
                self.checksums |= self._stored.checksums(read)
                # Copied, since a mapped file's pages would be read again whenever the system needs their memory.
                for name, value in read.items():
                    here = value.clone() if self._device.type == "cpu" else value.to(self._device)
                    parameters[name] = nn.Parameter(here, requires_grad=False)
                del read
            for name, first in names.items():
                if first in parameters:
                    module, leaf = _owner(model, name)
                    before.append((module, leaf, module._parameters[leaf]))  # type: ignore[arg-type]
                    module._parameters[leaf] = parameters[first]
            del parameters
            yield
        finally:
            for module, leaf, parameter in before:
                module._parameters[leaf] = parameter


class _Behind:
    """Work on one thing at a time while the next one is made: whoever brings the next waits for the one before."""

    def __init__(self, work: Callable[[dict[str, Tensor]], None]) -> None:
        self._work, self._pool = work, ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None

    def do(self, values: dict[str, Tensor]) -> None:
        """Raises what went wrong with the one before."""
        self.wait()
        self._under_way = self._pool.submit(self._work, values)

    def wait(self) -> None:
        """Until nothing is under way; raises what went wrong."""
        if self._under_way is not None:
            self._under_way.result()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()


class _Kept(Journal):
    """The layers that are written, and what enters the next one.

    Args:
        cut: the cut. weights: of its model. behind: what writes the layers. solved: checksums of what it has written.
        layers: how many there are.
    """

    def __init__(
        self, cut: FileCut, weights: StoredWeights, behind: _Behind, solved: dict[str, int], layers: int
    ) -> None:
        self._cut, self._weights, self._behind = cut, weights, behind
        self._solved, self._layers = solved, layers

    def resumed(self, runs: Sequence[Run], errors: dict[str, list[float]]) -> tuple[int, bool]:
        facts = self._cut.progress.state.get("layers")
        if facts is None:
            return 0, True
        self._weights.checksums |= facts["checksums"]
        self._solved |= facts["solved"]
        errors |= facts["errors"]
        self._cut.facts = {"layers": facts}
        begin, same = facts["next"], facts["same"]
        if begin < self._layers:
            hidden = self._cut.progress.hidden(begin)
            for i, run in enumerate(runs):
                device = run.pruned.device
                run.pruned = hidden[f"pruned.{i}"].to(device)
                run.dense = run.pruned if same else hidden[f"dense.{i}"].to(device)
        return begin, same

    def finished(self, index: int, runs: Sequence[Run], same: bool, errors: Mapping[str, list[float]]) -> None:
        if not self._cut.progress.due():
            return
        self._behind.wait()
        self.note(index + 1, same, errors)
        hidden: dict[str, Tensor] = {}
        if index + 1 < self._layers:
            hidden = {f"pruned.{i}": run.pruned for i, run in enumerate(runs)}
            hidden |= {} if same else {f"dense.{i}": run.dense for i, run in enumerate(runs)}
        self._cut.keep({name: of.cpu().contiguous() for name, of in hidden.items()} or None, index + 1)

    def note(self, following: int, same: bool, errors: Mapping[str, list[float]]) -> None:
        """All layers before `following` are written: what a state says of them."""
        checksums, solved = dict(self._weights.checksums), dict(self._solved)
        facts = {"next": following, "same": same, "errors": dict(errors), "checksums": checksums, "solved": solved}
        self._cut.facts = {"layers": facts}


def _place(name: str, path: str) -> int | None:
    """The index of the layer that a parameter is of; None for one outside of them."""
    return int(name.removeprefix(path).partition(".")[0]) if name.startswith(path) else None


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def refitted_into(
    cut: FileCut,
    plan: Plan,
    batches: Tensor | Sequence[Tensor],
    *,
    ridge: float,
    passes: int,
    device: torch.device,
) -> Plan:
    """`reconstruct` a plan's model and write it cut, one layer at a time.

    In memory are one layer as it was and as it is solved, the one before it while it is written, those behind it that
    go, and of all text the hidden states between two layers, of both models.

    Args:
        cut: the cut, of which nothing is written yet. batches, ridge, passes: as `reconstruct` takes
            them.
        device: where the layers run.

    Returns:
        The plan with the record and fingerprint that `reconstruct` gives it.

    Raises:
        UsageError, HywiaError: as `reconstruct`.
    """
    began = time.monotonic()
    check_ridge(ridge)
    check_passes(passes)
    stored, model = cut.stored, cut.stored.model
    solved: dict[str, int] = {}
    with apart(dict(model.named_modules())), torch.no_grad():
        samples = padded(batches)
        weights = StoredWeights(stored, cut.directory.bundles, device)
        path = arch.architecture(model).layers

        def write(values: dict[str, Tensor]) -> None:
            solved.update(stored.checksums(values))
            cut.write_values(values)

        with weights.running(), _Behind(write) as behind:

            def hand_over(index: int, layer: nn.Module) -> None:
                named = {f"{path}.{index}.{name}": p.detach() for name, p in layer.named_parameters()}
                behind.do({name: value.to("cpu", copy=True) for name, value in named.items()})

            journal = _Kept(cut, weights, behind, solved, len(arch.layers_of(model)))
            how: dict[str, Any] = {"passes": passes, "while_changed": hand_over, "weights": weights, "journal": journal}
            errors = through_layers(model, plan, cut.groups, samples, ridge, **how)
        journal.note(len(arch.layers_of(model)), False, errors)
        cut.write(weights.others, "cutting the rest")
    cut.check(plan, weights.checksums | cut.checksums)
    for name in weights.checksums:
        place = _place(name, f"{path}.")
        if plan.depth is not None and place in plan.depth.gone:
            solved[name] = 0  # of a layer of zeros, as which a reconstruction leaves it
    after = stored.fingerprint(weights.checksums | cut.checksums | solved)
    return refitted(plan, after, samples, ridge, passes, errors, began)
