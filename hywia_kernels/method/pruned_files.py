"""The cut from files to files: a plan carried out on a checkpoint of which no more than a few tensors are in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.loading import device_named
from ..checkpoint.stored_model import StoredModel, open_stored
from ..engine.samples import padded
from ..settings import RIDGE, STATE_SECONDS
from ..types import Plan
from .calibration_data import digest
from .file_cut import opened
from .file_reconstruction import refitted_into

__all__ = ["prune_files"]


def prune_files(
    model: str | Path | StoredModel,
    plan: Plan,
    path: str | Path,
    *,
    refit: Tensor | Sequence[Tensor] | None = None,
    ridge: float = RIDGE,
    passes: int = 0,
    record: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    in_place: bool = False,
    backend: str | None = None,
    every: float = STATE_SECONDS,
) -> Plan:
    """`load`, `reconstruct` where text is given, `prune` and `save` in one step and the same bytes, for a checkpoint
    that does not fit in memory.

    Without a reconstruction tensors are read from the mapped files, cut and written one by one (as many of them at a
    time as the machine has cores, four at the most); stacked experts are one tensor. With one, a decoder layer is in
    memory at a time. The files are read once. What is stopped goes on where the same is asked for again, from the last
    state that is kept beside `path`, and ends in the same bytes. Whether the files are those that the plan was made for
    is known at the end, before the directory gets its name.

    Args:
        model: as `load` takes it, in safetensors files, or what `open_stored` gave.
        plan: of the model, as `plan` gives it from scores; one that was refitted (`reconstruct`) is of other weights.
        path, record, overwrite, in_place: as `save` takes them.
        refit: token ids to reconstruct on, as `reconstruct` takes them; None: no reconstruction. ridge,
            passes: of it.
        device: where layers run that are reconstructed, as `load` takes it.
        dtype, trust_remote_code, revision: as `load` takes them. backend: of `ops.compact`.
        every: seconds between two states, at the least; a cut that takes less keeps none. 0: one after every layer.

    Returns:
        The plan as it is recorded: after a reconstruction, what `reconstruct` gives.

    Raises:
        UsageError, HywiaError: as `load`, `reconstruct`, `prune` and `save`; nothing is written then.
    """
    if not isinstance(model, StoredModel):
        model = open_stored(model, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision)
    where = device_named(device)
    given: dict[str, Any] = {"overwrite": overwrite, "in_place": in_place, "backend": backend, "every": every}
    with opened(model, plan, path, request=_asked(refit, ridge, passes, where), **given) as cut:
        if refit is not None:
            plan = refitted_into(cut, plan, refit, ridge=ridge, passes=passes, device=where)
        else:
            cut.write(cut.directory.bundles, "cutting files")
            cut.check(plan, cut.checksums)
        cut.directory.finish(plan, record, Path(path).absolute().name)
    return plan


def _asked(refit: Tensor | Sequence[Tensor] | None, ridge: float, passes: int, device: torch.device) -> dict[str, Any]:
    """What decides the solution of a reconstruction; JSON."""
    if refit is None:
        return {}
    samples = padded(refit)
    text = [digest(samples.tokens), samples.lengths.tolist()]
    return {"refit": text, "ridge": repr(ridge), "passes": passes, "device": device.type}
