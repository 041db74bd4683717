"""One verifier: `python -m verifier RUN NAME`."""

import asyncio
from pathlib import Path

from common import wire
from common.errors import exit_on_error
from common.layout import read_resolved
from common.limits import max_request_bytes
from common.log import logger
from common.membership import Activity, Membership
from common.process import begin_member, log_ready, run_until_stopped
from common.rendezvous import RunKeys
from common.tokenizer import load_tokenizer
from common.transport import Service, ledger_client
from verifier.sandbox import Sandbox
from verifier.service import VerifierService


def main() -> None:
    """Grades for the run until SIGTERM or SIGINT."""
    run_dir, name = begin_member(wire.Role.VERIFIER, __doc__)
    run_until_stopped(lambda stop: serve(run_dir, name, stop))


async def serve(run_dir: Path, name: str, stop: asyncio.Event) -> None:
    """Grades until `stop` is set; groups in work then are left to another verifier.

    Raises:
        DeadlineError: The ledger is gone.
        ModelError: The model's tokenizer cannot be read.
        SluiceError: No grading process can be started.
    """
    config, keys, activity = read_resolved(run_dir), RunKeys.load(run_dir), Activity()
    tokenizer = load_tokenizer(Path(config.model) / "tokenizer.json")
    sandbox = Sandbox(config.verifier)
    async with ledger_client(run_dir) as ledger, sandbox:
        verifier = VerifierService(name, ledger, tokenizer, sandbox, activity, config)
        service = Service(verifier.handle, keys=keys, host=config.run.host, max_request_bytes=max_request_bytes(config))
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
    log_ready()
    await membership.keep()


if __name__ == "__main__":
    with exit_on_error():
        main()
