"""The command line in several processes, of which one goes wrong.

Arguments: what it does (`killed` or `hangs` when a layer is finished; `lost`: is killed while operands change hands),
its rank, the layer (or which exchange), and the command's own.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from hywia_kernels.cli import main
from hywia_kernels.scale import job
from hywia_kernels.scale.ranks import Ranks
from hywia_kernels.scale.work import Work


def end(how: str) -> None:
    if how == "hangs":
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)


def run(how: str, rank: str, at: str, *command: str) -> int:
    keep, exchange, exchanges = Work.keep_state, Ranks.exchange, []

    def keep_and_end(self, finished, gradients, facts):
        keep(self, finished, gradients, facts)
        if finished == int(at):
            self.ranks.meet("the fault")
            if os.environ["RANK"] == rank:
                end(how)

    def exchange_and_end(self, parts, rows):
        exchanges.append(rows)
        if len(exchanges) == int(at) and os.environ["RANK"] == rank:
            end(how)
        return exchange(self, parts, rows)

    if how == "lost":
        Ranks.exchange = exchange_and_end
    else:
        Work.keep_state = keep_and_end
    job.calibrate_streamed.__kwdefaults__["every"] = 0.0  # a state after every layer
    return main(command)


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
