"""One generator: `python -m generator RUN NAME`."""

import argparse
import asyncio
import time
from pathlib import Path

import psutil

from common import wire
from common.config import Config
from common.errors import exit_on_error
from common.layout import read_resolved
from common.log import logger, start_logging
from common.membership import Activity, Membership
from common.process import die_with_parent, run_until_stopped
from common.transport import RunKeys, ledger_client


def main() -> None:
    """Samples until it is asked to stop, or the ledger is gone."""
    parser = argparse.ArgumentParser(prog="python -m generator", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run directory that the launcher made")
    parser.add_argument("name", help="of this process, such as generator-0")
    arguments = parser.parse_args()
    die_with_parent()
    start_logging("generator", arguments.run_dir, name=arguments.name)
    config = read_resolved(arguments.run_dir)
    run_until_stopped(lambda stop: generate(config, arguments.run_dir, arguments.name, stop))


async def generate(config: Config, run_dir: Path, name: str, stop: asyncio.Event) -> None:
    """Starts the engine, joins the run, and works until `stop` is set."""
    from generator.engine import Engine
    from generator.handover import Handover
    from generator.rollouts import Rollouts
    from generator.weights import Weights

    engine = Engine(config)
    logger().info("ready", seconds=round(time.time() - psutil.Process().create_time(), 2))
    keys, activity, patience_s = RunKeys.load(run_dir), Activity(), config.run.stall_timeout_s
    handover = Handover(keys, activity)
    try:
        async with ledger_client(run_dir) as ledger, asyncio.TaskGroup() as tasks:
            rollouts = Rollouts(name, engine, ledger, handover, config, activity)
            weights = Weights(
                engine, ledger, config.generator, activity, before_load=rollouts.finish_pinned, deadline_s=patience_s
            )
            hello = wire.Hello(role=wire.Role.GENERATOR, name=name, run=keys.public)
            membership = Membership(
                ledger, hello, activity, deadline_s=patience_s, holds=rollouts.holds, cancel=rollouts.cancel
            )
            await membership.join()
            working = [
                tasks.create_task(part)
                for part in (
                    membership.keep(),
                    weights.watch(lambda directory: handover.meet(directory.verifiers, tasks)),
                    weights.follow(),
                    rollouts.work(weights),
                    rollouts.report(),
                )
            ]
            await stop.wait()
            for task in (*working, *handover.tasks()):
                task.cancel()
    finally:
        engine.shutdown()
    logger().info("stopped")


if __name__ == "__main__":
    with exit_on_error():
        main()
