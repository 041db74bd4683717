"""Starting, restarting and stopping the processes of a run."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.errors import RunDirectoryError, SluiceError
from common.files import one_line
from common.log import logger
from common.process import LIVED_WELL_S
from launch.output import last_words
from launch.plan import FREE_PORT, REPOSITORY, STOP_ORDER, ProcessPlan
from launch.run_directory import check_space

FINAL_EXIT_CODES = (2, 3, 4)
_LONGEST_BACK_OFF_S = 30.0
_KILL_TIMEOUT_S = 10.0


class ProcessError(SluiceError):
    """A process of the run failed for good; it carries the exit code of the run."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Ended(NamedTuple):
    """How one life of a process ended.

    Attributes:
        code: Its exit code, or 128 + n where signal n killed it.
        line: What it said last.
    """

    code: int
    line: str

    def __str__(self) -> str:
        if self.code - 128 in signal.valid_signals():
            return f"killed by {signal.Signals(self.code - 128).name}"  # what it said last has nothing to do with it
        return f"exit code {self.code}: {self.line}" if self.line else f"exit code {self.code}"


class Supervisor:
    """The processes of a run, watched from start to end.

    Each is restarted with a growing pause, unless its exit code says that it would fail again. One that lived for ten
    minutes begins anew: with the first pause, and with all its restarts. The run is over when the learner ends by
    itself. What this does not do: it does not look inside; a process that hangs is the ledger's matter.
    """

    def __init__(
        self,
        plans: list[ProcessPlan],
        run_dir: Path,
        *,
        max_restarts: int,
        stop_timeout_s: float,
        back_off_s: float = 1.0,
        notice: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`notice` gets a line for people at each restart and kill; `back_off_s` is the first pause, then doubled.

        `clock` says how long a process has lived.
        """
        self._run_dir = run_dir
        self._children = [_Child(plan, run_dir) for plan in plans]
        self._max_restarts = max_restarts
        self._stop_timeout_s = stop_timeout_s
        self._back_off_s = back_off_s
        self._notice = notice
        self._clock = clock

    async def run(self, stop: asyncio.Event) -> None:
        """Starts the processes and returns when the learner ends by itself or `stop` is set; all are stopped then.

        Raises:
            ProcessError: A process failed for good; all are stopped.
        """
        keepers = [asyncio.create_task(self._keep(child), name=child.plan.name) for child in self._children]
        asked = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait([asked, *keepers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for child in self._children:
                child.wanted = False
            await self._stop()
            asked.cancel()
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(asked, *keepers, return_exceptions=True)
        for task in done:
            await task

    def kill(self) -> None:
        """Kills all processes and their descendants at once; `run` then returns soon."""
        for child in self._children:
            child.wanted = False
            child.signal(signal.SIGHUP)

    async def _keep(self, child: "_Child") -> None:
        """Runs one process until the learner's own end.

        Raises:
            ProcessError: Its exit code is final, it may not be restarted any more, or the disk is full.
        """
        num_restarts = 0
        while child.wanted:
            began = self._clock()
            ended = await child.live()
            if not child.wanted or (child.plan.role == "learner" and ended.code == 0):
                return
            self._check_end(child, ended)
            if self._clock() - began >= LIVED_WELL_S:
                num_restarts = 0
            if num_restarts == self._max_restarts:
                raise ProcessError(
                    f"{child.plan.name}: found {ended}, expected no more than run.max_restarts = "
                    f"{self._max_restarts} restarts"
                )
            pause_s = min(_LONGEST_BACK_OFF_S, self._back_off_s * 2**num_restarts)
            num_restarts += 1
            count = f"{num_restarts} of {self._max_restarts}"
            self._notice(f"{child.plan.name} ended with {ended}; restart {count} in {pause_s:g} s")
            await asyncio.sleep(pause_s)

    def _check_end(self, child: "_Child", ended: Ended) -> None:
        """Checks that a process that ended may be started again.

        Raises:
            ProcessError: Its exit code is final, or the disk is full: what it said of that may have found no room.
        """
        try:
            check_space(self._run_dir)
        except RunDirectoryError as error:
            raise ProcessError(f"{error} ({child.plan.name} ended with {ended})", error.exit_code) from error
        if ended.code in FINAL_EXIT_CODES:
            raise ProcessError(f"{child.plan.name}: {ended.line or ended}", ended.code)

    async def _stop(self) -> None:
        """Learner, generators, verifiers, ledger: each may finish what it owes to the next."""
        for role in STOP_ORDER:
            children = [child for child in self._children if child.plan.role == role]
            await asyncio.gather(*(self._stop_one(child) for child in children))

    async def _stop_one(self, child: "_Child") -> None:
        child.signal(signal.SIGTERM)
        if await child.ended_within(self._stop_timeout_s):
            return
        self._notice(f"{child.plan.name} did not stop within {self._stop_timeout_s:g} s and is killed")
        child.signal(signal.SIGHUP)
        if not await child.ended_within(_KILL_TIMEOUT_S):
            child.signal(signal.SIGKILL)


class _Child:
    """One process through its lives.

    Attributes:
        wanted: Whether it should be alive.
    """

    def __init__(self, plan: ProcessPlan, run_dir: Path) -> None:
        self.plan = plan
        self.wanted = True
        self._output = run_dir / "logs" / f"{plan.name}.out"
        self._process: asyncio.subprocess.Process | None = None
        self._asked: signal.Signals | None = None
        self._gone = asyncio.Event()
        self._gone.set()

    async def live(self) -> Ended:
        """Starts it and waits for its end."""
        self._gone.clear()
        try:
            return await self._live()
        finally:
            self._gone.set()

    async def _live(self) -> Ended:
        command = child_command(tuple(word.replace(FREE_PORT, str(free_port())) for word in self.plan.command))
        with one_line(self._output):
            self._output.parent.mkdir(parents=True, exist_ok=True)
            output = self._output.open("ab")
        with output:
            offset = output.seek(0, os.SEEK_END)
            self._process = await asyncio.create_subprocess_exec(
                *command,
                cwd=REPOSITORY,
                env=child_environment() | self.plan.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        logger().info("process_started", child=self.plan.name, pid=self._process.pid)
        if self._asked is not None:  # it was asked to stop while it was being started
            self.signal(self._asked)
        code = await self._process.wait()
        words = last_words(self._output, offset)
        if code == 1 and words.rank_exit_code is not None:
            code = words.rank_exit_code
        ended = Ended(code if code >= 0 else 128 - code, words.line)
        logger().info("process_ended", child=self.plan.name, exit_code=ended.code, line=ended.line)
        return ended

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to what `launch/child.py` runs; SIGHUP kills it with its descendants, stopped ones too.

        A process that is still being started gets it once it is there, the one to kill it before any other.
        """
        self._asked = self._asked if self._asked is signal.SIGHUP else number
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
                if number is signal.SIGHUP:
                    self._process.send_signal(signal.SIGCONT)  # a stopped process hears nothing until it goes on

    async def ended_within(self, timeout_s: float) -> bool:
        """Waits for its end."""
        try:
            await asyncio.wait_for(self._gone.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


def run_foreground(command: tuple[str, ...]) -> str:
    """Runs a command to its end and returns what it wrote to stdout; an interruption kills it with its descendants.

    Raises:
        ProcessError: It failed; the message is its own line where it wrote one, and its output otherwise.
    """
    process = subprocess.Popen(
        child_command(command),
        cwd=REPOSITORY,
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        out, err = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGHUP)
        process.wait()
        raise
    if process.returncode == 0:
        return out.strip()
    own = [line.removeprefix("sluice: ") for line in err.splitlines() if line.startswith("sluice: ")]
    what = " ".join(command[1:3])
    message = own[-1] if own else f"python {what}: found exit code {process.returncode}, expected 0: {_last_line(err)}"
    raise ProcessError(message, process.returncode if own else 1)


def child_command(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command under `launch/child.py`, isolated from whatever is installed."""
    return (sys.executable, "-I", "-S", str(REPOSITORY / "launch" / "child.py"), str(os.getpid()), *command)


def child_environment() -> dict[str, str]:
    """What every process of a run has in its environment."""
    python_path = os.pathsep.join(p for p in (str(REPOSITORY), os.environ.get("PYTHONPATH", "")) if p)
    return os.environ | {
        "PYTHONPATH": python_path,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def free_port() -> int:
    """A port of the loopback that nobody listens on; someone may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
