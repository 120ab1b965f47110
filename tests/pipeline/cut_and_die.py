"""Cuts a model from files to files, with a state after every layer, and is killed when so many states are kept.

Arguments: the model, the plan's seed file, the output, how many states (0: it ends by itself), and `refit` or `cut`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

import hywia_kernels as hk
from hywia_kernels.checkpoint.cut_progress import CutProgress
from hywia_kernels.method import file_cut


def main(model: str, plan: str, output: str, states: str, what: str) -> None:
    torch.set_num_threads(1)
    file_cut._WORKERS = 1
    keep, kept = CutProgress.keep, []

    def keep_and_die(self, *arguments):
        keep(self, *arguments)
        kept.append(1)
        if len(kept) == int(states):
            os.kill(os.getpid(), signal.SIGKILL)

    CutProgress.keep = keep_and_die
    told = torch.load(Path(plan), weights_only=False)
    refit = told["tokens"] if what == "refit" else None
    hk.prune_files(model, told["plan"], output, refit=refit, every=0.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
