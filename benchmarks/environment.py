"""Where, when and from what the figures of a run come: the columns that all CSV files share."""

from __future__ import annotations

import datetime
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hywia_kernels.deploy.hardware import device_name
from hywia_kernels.versions import versions

from .timing import Timer

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    """Versions, device and command of a run, and the device's ceilings in it, where the run measured them."""

    date: str
    device: str
    threads: int
    python: str
    torch: str
    triton: str
    transformers: str
    cuda: str  # empty on a CPU
    commit: str
    seed: int  # of the random inputs, or of the calibration samples
    command: str
    empty_us: float | None = None  # what the timer reads for no work at all
    copy_gb_s: float | None = None
    read_gb_s: float | None = None
    matmul_tflop_s: float | None = None

    @classmethod
    def record(
        cls, device: torch.device, module: str, arguments: Sequence[str], seed: int, timer: Timer | None = None
    ) -> Environment:
        """Of a run of `python -m module arguments` on `device`; with a timer, the device's ceilings as well."""
        known = versions()
        ceilings = {}
        if timer is not None:
            ceilings = {
                "empty_us": timer.empty_us,
                "copy_gb_s": timer.copy_bandwidth(),
                "read_gb_s": timer.read_bandwidth(),
                "matmul_tflop_s": timer.matmul_rate(),
            }
        return cls(
            date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
            device=device_name(device),
            threads=torch.get_num_threads(),
            python=known["python"],
            torch=torch.__version__,
            triton=known.get("triton", ""),
            transformers=known.get("transformers", ""),
            cuda=(torch.version.cuda or "") if device.type == "cuda" else "",
            commit=commit(),
            seed=seed,
            command=shlex.join(["python", "-m", module, *arguments]),
            **ceilings,
        )


def commit() -> str:
    """Short hash, with "-dirty" when tracked files other than the results differ; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(REPOSITORY), *arguments), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/*.csv")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
