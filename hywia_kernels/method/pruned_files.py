"""The cut from files to files: a plan carried out on a checkpoint of which no more than a few tensors are in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.loading import device_named
from ..checkpoint.stored_model import StoredModel, open_stored
from ..settings import RIDGE
from ..types import Plan
from .file_cut import opened
from .file_reconstruction import refitted_into
from .surgery import check_fingerprint

__all__ = ["prune_files"]


def prune_files(
    model: str | Path | StoredModel,
    plan: Plan,
    path: str | Path,
    *,
    refit: Tensor | Sequence[Tensor] | None = None,
    ridge: float = RIDGE,
    record: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    in_place: bool = False,
    backend: str | None = None,
) -> Plan:
    """`load`, `reconstruct` where text is given, `prune` and `save` in one step and the same bytes, for a checkpoint
    that does not fit in memory.

    Without a reconstruction tensors are read from the mapped files, cut and written one by one (as many of them at a
    time as the machine has cores, four at the most); stacked experts are one tensor. With one, a decoder layer is in
    memory at a time. The files are read once. Whether they are those that the plan was made for is known at the end,
    before the directory gets its name.

    Args:
        model: as `load` takes it, in safetensors files, or what `open_stored` gave.
        plan: of the model, as `plan` gives it from scores; one that was refitted (`reconstruct`) is of other weights.
        path, record, overwrite, in_place: as `save` takes them.
        refit: token ids to reconstruct on, as `reconstruct` takes them; None: no reconstruction. ridge: of it.
        device: where layers run that are reconstructed, as `load` takes it.
        dtype, trust_remote_code, revision: as `load` takes them. backend: of `ops.compact`.

    Returns:
        The plan as it is recorded: after a reconstruction, what `reconstruct` gives.

    Raises:
        UsageError, HywiaError: as `load`, `reconstruct`, `prune` and `save`; nothing is written then.
    """
    if not isinstance(model, StoredModel):
        model = open_stored(model, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision)
    with opened(model, plan, path, overwrite=overwrite, in_place=in_place, backend=backend) as cut:
        if refit is not None:
            plan = refitted_into(cut, plan, refit, ridge=ridge, device=device_named(device))
        else:
            cut.write(cut.directory.bundles, "cutting files")
            check_fingerprint(plan, model.fingerprint(cut.checksums))
        cut.directory.finish(plan, record, Path(path).absolute().name)
    return plan
