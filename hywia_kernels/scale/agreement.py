"""Whether all processes of a scoring, and an earlier one that it goes on from, read the same weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from ..arch.facts import FingerprintReading
from ..errors import HywiaError
from .ranks import Ranks
from .work import Work

__all__ = ["check_weights"]


def check_weights(reading: FingerprintReading, ranks: Ranks, work: Work, has_runs: bool) -> dict[str, str]:
    """What was read of each module, with what an earlier run read of those above; the digests are compared, and only
    where they differ the modules themselves.

    Args:
        reading: of this process. has_runs: whether it has read the layers at all.

    Raises:
        HywiaError: weights that differ; the message names the module. The same on all processes.
    """
    lines = {name: " ".join(of) for name, of in reading.lines().items()}
    digest = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    digests = ranks.tell(digest if has_runs else None, "the end of the forward pass")
    if len({d for d in digests if d is not None}) > 1:
        _name_others(lines if has_runs else None, ranks)
    known: Mapping[str, str] = work.state.get("weights", {})
    for name, line in lines.items() if has_runs else ():
        if known.get(name, line) != line:
            raise HywiaError(
                f"{name}: has other weights than when this scoring was stopped; remove {work.folder} to begin anew"
            )
    return {**known, **lines}


def _name_others(lines: Mapping[str, str] | None, ranks: Ranks) -> None:
    """Raises what all processes raise of weights that are not the same."""
    told = ranks.tell(lines, "a comparison of weights")
    for rank, other in enumerate(told):
        for name in other or ():
            if other[name] != told[0][name]:
                raise HywiaError(
                    f"{name}: rank {rank} read other weights than other ranks; start all of them on the same model"
                )
