"""What every process of a run does first and last."""

import argparse
import asyncio
import ctypes
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil

from common import wire
from common.errors import SluiceError
from common.log import logger, start_logging

LIVED_WELL_S = 600.0  # a process that lived so long has all its restarts again
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks the kernel to kill this process when the thread that started it ends, so that no orphan is left.

    Linux only, and reset by exec of a set-user-id program: enough for processes that the launcher starts.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def begin_member(role: wire.Role, description: str | None) -> tuple[Path, str]:
    """Reads the command line `RUN NAME` of a generator or verifier and starts its log; returns the two."""
    parser = argparse.ArgumentParser(prog=f"python -m {role}", description=description)
    parser.add_argument("run_dir", type=Path, help="the run directory that the launcher made")
    parser.add_argument("name", help=f"of this process, such as {role}-0")
    arguments = parser.parse_args()
    die_with_parent()
    start_logging(role, arguments.run_dir, name=arguments.name)
    return arguments.run_dir, arguments.name


def log_ready(**values: object) -> None:
    """Logs that this process can begin its work, with the seconds since it was started."""
    logger().info("ready", seconds=round(time.time() - psutil.Process().create_time(), 2), **values)


def run_until_stopped(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Runs `main` in an event loop; SIGTERM and SIGINT set the event that it is given.

    Raises:
        SluiceError: The first of the errors that `main` ended with, out of its exception group.
    """

    async def body() -> None:
        stop = asyncio.Event()
        stop_on_signals(stop)
        await main(stop)

    try:
        asyncio.run(body())
    except BaseExceptionGroup as group:
        raise first_error(group) from group


def stop_on_signals(stop: asyncio.Event) -> None:
    """Sets `stop` on SIGTERM and SIGINT, in the running loop; whoever had the signals before loses them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first SluiceError in a group, else its first exception."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending[:0] = error.exceptions
        else:
            leaves.append(error)
    return next((leaf for leaf in leaves if isinstance(leaf, SluiceError)), leaves[0])
