"""The command line in several processes, of which one is killed when a layer is finished.

Arguments: the rank, the layer, and the command's own.
"""

from __future__ import annotations

import os
import signal
import sys

from hywia_kernels.cli import main
from hywia_kernels.scale import job
from hywia_kernels.scale.work import Work


def run(rank: str, layer: str, *command: str) -> int:
    keep = Work.keep_state

    def keep_and_die(self, finished, gradients, facts):
        keep(self, finished, gradients, facts)
        if finished == int(layer):
            self.ranks.meet("the kill")
            if os.environ["RANK"] == rank:
                os.kill(os.getpid(), signal.SIGKILL)

    Work.keep_state = keep_and_die
    job.calibrate_streamed.__kwdefaults__["every"] = 0.0  # a state after every layer
    return main(command)


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
