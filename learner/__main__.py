"""One rank of the learner: `torchrun --max-restarts=0 -m learner RUN`."""

import argparse
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from threading import Event

from common.errors import exit_on_error
from common.layout import read_resolved
from common.log import KERNELS, logger, start_logging
from common.process import die_with_parent, log_ready


def main() -> None:
    """Trains until the run's last step, or until SIGTERM, SIGINT or SIGUSR1 asks for a checkpoint and an end."""
    parser = argparse.ArgumentParser(prog="python -m learner", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run directory that the launcher made")
    run_dir = parser.parse_args().run_dir
    die_with_parent()
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())
    start_logging("learner", run_dir, name=f"learner-{os.environ.get('RANK', '0')}")
    config = read_resolved(run_dir)

    from learner.link import LedgerLink
    from learner.loop import Learner
    from learner.megatron.policy import Policy
    from learner.ranks import Ranks
    from learner.shared import SharedLedger

    policy, ranks = Policy(config), Ranks()
    if ranks.is_first:
        logger().info(KERNELS, chosen=policy.kernels._asdict())
    with ExitStack() as closing:
        link = None
        if ranks.is_first:
            timeout_s = config.run.stall_timeout_s
            link = closing.enter_context(LedgerLink(run_dir, stall_timeout_s=timeout_s, should_stop=stop.is_set))
        log_ready()
        Learner(config, run_dir, policy, SharedLedger(ranks, link), ranks).train()


if __name__ == "__main__":
    with exit_on_error():
        main()
