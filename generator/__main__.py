"""One generator: `python -m generator RUN NAME`."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from common import wire
from common.config import Config
from common.errors import exit_on_error
from common.layout import read_resolved
from common.log import logger
from common.membership import Activity, Membership
from common.memory import MemoryDirectory
from common.process import begin_member, log_ready, run_until_stopped, stop_on_signals
from common.rendezvous import RunKeys
from common.transport import ledger_client

if TYPE_CHECKING:
    from generator.engine import Engine


def main() -> None:
    """Samples until it is asked to stop, or the ledger is gone."""
    run_dir, name = begin_member(wire.Role.GENERATOR, __doc__)
    config = read_resolved(run_dir)
    run_until_stopped(lambda stop: generate(config, run_dir, name, stop))


async def generate(config: Config, run_dir: Path, name: str, stop: asyncio.Event) -> None:
    """Starts the engine, joins the run, and works until `stop` is set."""
    from generator.engine import Engine

    with MemoryDirectory.make(Path(config.weights.dir), name) as memory:
        engine = Engine(config, memory.path)
        stop_on_signals(stop)
        log_ready()
        try:
            await _work(config, run_dir, name, engine, memory.path, stop)
        finally:
            await engine.close()
    logger().info("stopped")


async def _work(config: Config, run_dir: Path, name: str, engine: "Engine", memory: Path, stop: asyncio.Event) -> None:
    from generator.handover import Handover
    from generator.rollouts import Rollouts
    from generator.weights import Weights
    from generator.weights_copy import WeightsCopy

    keys, activity, patience_s = RunKeys.load(run_dir), Activity(), config.run.stall_timeout_s
    handover = Handover(keys, activity)
    copy = WeightsCopy(memory, Path(config.model), keys, deadline_s=patience_s)
    async with ledger_client(run_dir) as ledger, asyncio.TaskGroup() as tasks:
        rollouts = Rollouts(name, engine, ledger, handover, config, activity)
        weights = Weights(engine, copy, ledger, config, activity, before_load=rollouts.finish_pinned)
        hello = wire.Hello(role=wire.Role.GENERATOR, name=name, run=keys.public)
        membership = Membership(
            ledger,
            hello,
            activity,
            deadline_s=patience_s,
            holds=rollouts.holds,
            finished=rollouts.finished,
            cancel=rollouts.cancel,
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
        held = rollouts.holds()
        for task in (*working, *handover.tasks()):
            task.cancel()
        await rollouts.leave(held)


if __name__ == "__main__":
    with exit_on_error():
        main()
