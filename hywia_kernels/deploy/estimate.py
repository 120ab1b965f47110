"""What a run will take, before it begins: seconds by stage, memory of the device, room on the disk.

FLOPs are counted from the model's shapes (see `stage_seconds`); a stage's seconds are its FLOPs over the device's rate
of the kind and the stage's efficiency, which is the share of that rate the stage was measured to reach. They were set
on LLaMA-7B's shapes in bfloat16 on an H100 with products of 780 TFLOP/s, cut by half: scoring 96 samples of 128 tokens
1.2 s, head ranking on them 2.2 s, reconstruction on 1,024 samples 14.7 s, cutting 0.10 s; and roughly, on a CPU of two
threads shared with other work, on SmolLM2. Expect the right order of magnitude, and a factor of two or three where a
device is shared, a model is very small or its layers are run by a slower path. Reading and writing the model on the
disk is not counted, nor is evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import arch
from ..errors import UsageError
from ..method.recovery.request import Recovery
from . import stage_bytes as bytes_of
from . import stage_seconds as seconds_of
from .cost import cost_of
from .rates import Rates, measured_rates

__all__ = ["STAGES", "Estimate", "estimate"]

STAGES = (
    "writing",
    "scoring",
    "head ranking",
    "layer ranking",
    "searching",
    "reconstruction",
    "cutting",
    "recovery text",
    "recovery",
)


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        seconds: by stage, of STAGES; those that the run does not have are left out.
        memory_bytes: of the device at the stage that needs most, the weights with it.
        disk_bytes: of the weights that are written.
    """

    seconds: Mapping[str, float]
    memory_bytes: int
    disk_bytes: int

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def estimate(
    model: Any,
    *,
    samples: int = 96,
    seq_len: int = 128,
    writes: bool = False,
    ranks_heads: bool = False,
    layer_samples: int = 0,
    layers_priced: int = 0,
    reconstruct_samples: int = 0,
    layer_passes: int = 0,
    recover: Recovery | None = None,
    trials: int = 0,
    trial_samples: tuple[int, int] = (0, 0),
    ratio: float = 0.5,
    device: torch.device | str | None = None,
    rates: Rates | None = None,
) -> Estimate:
    """Estimate a run of the recipe.

    Args:
        model: to be pruned; it may be on the meta device (`skeleton`).
        samples: scored, 0 for a run that scores nothing on text. seq_len: tokens of a sample.
        writes: the model writes the text, as many samples as scoring or reconstruction takes.
        ranks_heads: heads are ranked by a regression, on the samples that are scored.
        layer_samples: on which whole layers are scored, 0 for none. layers_priced: how many of them get a price.
        reconstruct_samples: 0 for none. layer_passes: over them in which each layer is trained.
        recover: the recovery that follows, resolved; None: none.
        trials: plans that a search tries. trial_samples: that each is refitted and judged on.
        ratio: share of the units that goes.
        device: of the run; None: the model's, or the CPU where that is the meta device.
        rates: of the device; None: they are measured, in about 0.3 s.

    Raises:
        UsageError: a count below zero, fewer than two tokens, or a ratio beyond [0, 1). HywiaError: an unknown
            architecture.
    """
    for name, value, least in (
        ("samples", samples, 0),
        ("seq_len", seq_len, 2),
        ("layer_samples", layer_samples, 0),
        ("layers_priced", layers_priced, 0),
        ("reconstruct_samples", reconstruct_samples, 0),
        ("layer_passes", layer_passes, 0),
        ("trials", trials, 0),
        *(("trial_samples", count, 0) for count in trial_samples),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{name}: expected a whole number from {least}, got {value!r}")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio < 1.0:
        raise UsageError(f"ratio: expected a number from 0 to below 1, got {ratio!r}")
    where = _device(model, device)
    work, groups = cost_of(model), arch.groups(model)
    rates = measured_rates(where, next(model.parameters()).dtype) if rates is None else rates
    scored, written = samples if ranks_heads else 0, max(samples, reconstruct_samples) if writes else 0
    kept = 1.0 - ratio
    seconds = {
        "writing": seconds_of.writing(work, written, seq_len, where, rates),
        "scoring": seconds_of.scoring(work, samples, seq_len, rates),
        "head ranking": seconds_of.ranking(work, groups, scored, seq_len, rates),
        "layer ranking": seconds_of.layer_ranking(work, layer_samples, seq_len, layers_priced, rates),
        "searching": seconds_of.searching(work, groups, trials, trial_samples, seq_len, layer_passes, kept, rates),
        "reconstruction": seconds_of.reconstruction(work, groups, reconstruct_samples, seq_len, kept, rates)
        + seconds_of.layer_training(work, reconstruct_samples, seq_len, layer_passes, kept, rates),
        "cutting": seconds_of.cutting(work, rates) if ratio else 0.0,
        "recovery text": seconds_of.recovery_text(work, recover, where, rates),
        "recovery": seconds_of.recovery(work, recover, kept, rates),
    }
    size = work.element_size
    removed = sum(int(ratio * g.units) * g.unit_parameters for g in groups if not g.tied_width)
    return Estimate(
        seconds={stage: seconds[stage] for stage in STAGES if seconds[stage] > 0.0},
        memory_bytes=work.weight_bytes
        + max(
            bytes_of.writing(work, written, seq_len, where),
            bytes_of.scoring(model, groups, samples, seq_len, where),
            bytes_of.ranking(work, groups, scored, seq_len),
            bytes_of.layer_ranking(work, layer_samples, seq_len),
            bytes_of.reconstruction(work, groups, reconstruct_samples, seq_len, kept)
            + bytes_of.layer_training(work, reconstruct_samples, layer_passes, kept, where),
            bytes_of.recovery(model, work, recover, kept, where),
            bytes_of.searching(work, groups, trials, trial_samples, seq_len, kept),
        ),
        disk_bytes=max(work.weight_bytes - removed * size, 0),
    )


def _device(model: Any, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    own = next(model.parameters()).device
    return torch.device("cpu") if own.type == "meta" else own
