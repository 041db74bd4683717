"""One verifier: `python -m verifier RUN NAME`."""

import argparse
import asyncio
import time
from pathlib import Path

import psutil

from common import wire
from common.errors import exit_on_error
from common.layout import read_resolved
from common.log import logger, start_logging
from common.membership import Activity, Membership
from common.process import die_with_parent, run_until_stopped
from common.rendezvous import RunKeys
from common.transport import Service, ledger_client
from verifier.sandbox import Sandbox
from verifier.service import VerifierService, load_tokenizer


def main() -> None:
    """Grades for the run until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m verifier", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run directory that the launcher made")
    parser.add_argument("name", help="of this process, such as verifier-0")
    arguments = parser.parse_args()
    die_with_parent()
    start_logging("verifier", arguments.run_dir, name=arguments.name)
    run_until_stopped(lambda stop: serve(arguments.run_dir, arguments.name, stop))


async def serve(run_dir: Path, name: str, stop: asyncio.Event) -> None:
    """Grades until `stop` is set; groups in work then are left to another verifier.

    Raises:
        DeadlineError: The ledger is gone.
        ModelError: The model's tokenizer cannot be read.
        SluiceError: No grading process can be started.
    """
    config, keys, activity = read_resolved(run_dir), RunKeys.load(run_dir), Activity()
    tokenizer = load_tokenizer(Path(config.model))
    sandbox = Sandbox(config.verifier)
    async with ledger_client(run_dir) as ledger, sandbox:
        verifier = VerifierService(name, ledger, tokenizer, sandbox, activity, config)
        service = Service(verifier.handle, keys=keys, host=config.run.host)
        hello = wire.Hello(role=wire.Role.VERIFIER, name=name, run=keys.public, endpoint=service.endpoint)
        membership = Membership(ledger, hello, activity, deadline_s=config.run.stall_timeout_s)
        async with service, asyncio.TaskGroup() as tasks:
            working = [
                tasks.create_task(service.serve()),
                tasks.create_task(verifier.work()),
                tasks.create_task(_belong(membership)),
            ]
            await stop.wait()
            for task in working:
                task.cancel()
    logger().info("stopped")


async def _belong(membership: Membership) -> None:
    await membership.join()
    logger().info("ready", seconds=round(time.time() - psutil.Process().create_time(), 2))
    await membership.keep()


if __name__ == "__main__":
    with exit_on_error():
        main()
