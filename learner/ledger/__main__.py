"""`python -m learner.ledger RUN` is the ledger; `--prepare` loads the prompts, `--audit` proves the accounts."""

import argparse
import asyncio
import fcntl
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from common.errors import RunDirectoryError, exit_on_error
from common.layout import read_resolved
from common.limits import max_request_bytes
from common.log import logger, start_logging
from common.process import die_with_parent, log_ready, run_until_stopped
from common.rendezvous import Rendezvous, RunKeys
from common.transport import Service
from learner.ledger.audit import audit
from learner.ledger.schema import LOCK
from learner.ledger.service import LedgerService
from learner.ledger.store import Store


def main() -> None:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m learner.ledger", description=__doc__)
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--prepare", action="store_true", help="load, check and tokenize the prompts, then exit")
    parser.add_argument("--audit", action="store_true", help="print the accounts; exit 1 if a sum does not hold")
    arguments = parser.parse_args()
    with exit_on_error():
        if arguments.audit:
            sys.exit(_audit(arguments.run))
        with _alone(arguments.run):
            if arguments.prepare:
                _prepare(arguments.run)
            else:
                die_with_parent()
                start_logging("ledger", arguments.run)
                run_until_stopped(lambda stop: serve(arguments.run, stop))


async def serve(run_dir: Path, stop: asyncio.Event) -> None:
    """Answers until `stop` is set.

    Raises:
        RunDirectoryError: The port is taken, the file is of another run, or cannot be written any more.
    """
    config, keys, store = read_resolved(run_dir), RunKeys.load(run_dir), Store(run_dir)
    store.check_whole()
    incarnation = store.identify(keys.public)
    ledger = LedgerService(
        store, config, run=keys.public, incarnation=incarnation, refused=lambda: service.refusals.counts
    )
    service = Service(
        ledger.handle,
        keys=keys,
        host=config.run.host,
        port=config.run.ledger_port,
        max_request_bytes=max_request_bytes(config),
    )
    async with service, asyncio.TaskGroup() as tasks:
        keeper = ledger.keeper
        parts = (service.serve(), keeper.keep_time(), keeper.keep_log_short(), ledger.leases.work())
        working = [tasks.create_task(part) for part in parts]
        Rendezvous(address=service.endpoint, public_key=keys.public, incarnation=incarnation).write(run_dir)
        log_ready(endpoint=service.endpoint, incarnation=incarnation)
        stopping = tasks.create_task(stop.wait())
        await asyncio.wait([stopping, keeper.failed], return_when=asyncio.FIRST_COMPLETED)
        for task in (*working, stopping):
            task.cancel()
    store.close()
    if keeper.failed.done():
        keeper.failed.result()
    logger().info("stopped")


def _prepare(run_dir: Path) -> None:
    from learner.ledger.prompts import prepare  # the ledger itself needs neither pyarrow nor tokenizers

    store = Store(run_dir)
    prepared = prepare(store, read_resolved(run_dir))
    store.begin_session()
    store.close()
    num_train, num_test, num_rejected = prepared
    sys.stdout.write(f"{num_train} prompts to train on, {num_test} held out, {num_rejected} outside the limits\n")


def _audit(run_dir: Path) -> int:
    found = audit(run_dir)
    sys.stdout.writelines(f"{line}\n" for line in (*found.lines, *(f"WRONG: {wrong}" for wrong in found.wrong)))
    return 1 if found.wrong else 0


@contextmanager
def _alone(run_dir: Path) -> Generator[None]:
    """Holds the run directory's lock: there is one ledger.

    Raises:
        RunDirectoryError: Another ledger has it, or the directory cannot be written.
    """
    path = run_dir / LOCK
    try:
        file = path.open("w")
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirectoryError(f"{path}: found another ledger at work in this directory, expected none") from None
        yield


if __name__ == "__main__":
    main()
