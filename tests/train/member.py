"""One process of a small job that does what every job does: steps with a collective in each.

    python -m tests.train.member FOLDER --coordinator … --num-processes … --process-id …

It goes through the command line's own start and end. `FOLDER/at.<i>` holds the step of process i;
`FOLDER/fail.<i>` makes process i raise what the file names.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from train import cli, distributed
from train.exits import ExitCode


def work(options: argparse.Namespace) -> int:
    with distributed.job(
        distributed.Wanted(options.coordinator, options.num_processes, options.process_id)
    ):
        import numpy as np
        from jax.experimental import multihost_utils

        from data_pipelines.batch import DataError
        from train.peers import current
        from train.watch import StopSignal

        peers = current()
        assert peers is not None
        folder, step = Path(options.folder), 0
        failures = {"data": DataError("3 of 4 records are bad"), "bug": KeyError("left")}
        with StopSignal(peers) as stop:
            while step < options.steps:
                peers.doing = f"at step {step}"
                order = folder / f"fail.{peers.index}"
                if order.exists():
                    raise failures[order.read_text()]
                everyone = multihost_utils.process_allgather(np.asarray(step))
                assert (np.asarray(everyone) == step).all(), everyone
                step += 1
                (folder / f"at.{peers.index}").write_text(str(step))
                if stop.agreed():
                    print(f"stopped at {step} by {stop.name}")
                    return ExitCode.PREEMPTED
                time.sleep(0.05)
    return ExitCode.OK


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    options.run, options.debug = work, False
    return cli.run(options)


if __name__ == "__main__":
    sys.exit(main())
