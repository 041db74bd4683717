"""Grading processes that can be killed: a pool that answers for each task, whatever the reward does.

A group goes to one process, which answers task by task; each task has its own deadline. A process that misses it is
killed (`timeout`); one that dies or answers with anything but a grade is killed too (`error`). The tasks after it go to
its successor. A failure is never a reward.
"""

import asyncio
import math
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import msgspec

from common.errors import ConfigError, DeadlineError, SluiceError
from common.log import logger
from common.sections import VerifierConfig
from common.wire import Grade, Outcome
from verifier.tasks import HEAD_BYTES, MAX_ANSWER_BYTES, Ready, Task, frame

WORKER: Final = (sys.executable, "-m", "verifier.worker")
START_S: Final = 60.0
STOP_S: Final = 5.0
GRACE_S: Final = 0.05
MIN_FREE_BYTES: Final = 64 << 20
_ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Sandbox:
    """A pool of grading processes. Use as an async context manager.

    Attributes:
        num_failures: Tasks that got no reward, by outcome, since the start.
        num_replaced: Processes that took the place of one that failed, died or had done `max_items`, since the start.
    """

    def __init__(self, config: VerifierConfig, *, command: Sequence[str] = WORKER) -> None:
        """`command` starts a grading process; the limits are added to it."""
        self._config = config
        self._command = command
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._workers: set[_Worker] = set()
        self.num_failures = {Outcome.TIMEOUT: 0, Outcome.ERROR: 0}
        self.num_replaced = 0

    async def __aenter__(self) -> Self:
        try:
            for worker in await asyncio.gather(*(self._start() for _ in range(self._config.num_workers))):
                self._idle.put_nowait(worker)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def grade(self, tasks: Sequence[Task]) -> tuple[Grade, ...]:
        """A grade for each task, in order. Waits for a process that has nothing to do.

        Raises:
            SluiceError: A process cannot be replaced.
        """
        grades: list[Grade] = []
        worker = await self._idle.get()
        try:
            while len(grades) < len(tasks):
                worker = await self._usable(worker)
                grades += await self._grade_until_failure(worker, tasks[len(grades) :])
        except BaseException:  # cancelled, most likely: what the process still writes belongs to nobody
            worker.kill()
            raise
        finally:
            self._idle.put_nowait(worker)
        return tuple(grades)

    async def _usable(self, worker: "_Worker") -> "_Worker":
        """The worker, or its successor."""
        if worker.is_alive and worker.num_tasks < self._config.max_items:
            return worker
        worker.kill()
        successor = await self._start()
        self.num_replaced += 1
        return successor

    async def _grade_until_failure(self, worker: "_Worker", tasks: Sequence[Task]) -> list[Grade]:
        grades: list[Grade] = []
        worker.send(tasks)
        for _ in tasks:
            grade = await worker.next_grade(self._config.deadline_s)
            grades.append(grade)
            if not grade.outcome.graded:
                self.num_failures[grade.outcome] += 1
                worker.kill()
                break
        return grades

    async def _start(self) -> "_Worker":
        limits = (str(self._config.memory_bytes), str(self._config.deadline_s))
        process = await asyncio.create_subprocess_exec(
            *self._command, *limits, stdin=PIPE, stdout=PIPE, env={**os.environ, **_ONE_THREAD}
        )
        worker = _Worker(process)
        self._workers = {other for other in self._workers if not other.is_gone} | {worker}
        in_use = (await worker.ready(START_S)).address_space_bytes
        if in_use + MIN_FREE_BYTES > self._config.memory_bytes:
            raise ConfigError(
                f"verifier.memory_bytes: found {self._config.memory_bytes}, expected at least "
                f"{in_use + MIN_FREE_BYTES}: a grading process starts with {in_use}"
            )
        return worker

    async def _stop(self) -> None:
        for worker in self._workers:
            worker.kill()
        try:
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*(worker.ended() for worker in self._workers))
        except TimeoutError:
            num_left = sum(not worker.is_gone for worker in self._workers)
            logger().warning("workers_left", num_workers=num_left, waited_s=STOP_S)


class _Worker:
    """One grading process and how many tasks it was given."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.num_tasks = 0
        self._process = process
        self._is_killed = False
        self._tasks, self._grades = process.stdin, process.stdout

    @property
    def is_alive(self) -> bool:
        return not (self._is_killed or self.is_gone)

    @property
    def is_gone(self) -> bool:
        return self._process.returncode is not None

    async def ready(self, deadline_s: float) -> Ready:
        try:
            async with asyncio.timeout(deadline_s):
                return msgspec.msgpack.decode(await self._read(), type=Ready)
        except TimeoutError:
            raise DeadlineError(f"waited {deadline_s:g} s for a grading process to start") from None
        except (asyncio.IncompleteReadError, msgspec.MsgspecError) as error:
            raise SluiceError(f"found {error!r} from a starting grading process, expected it to be ready") from error

    def send(self, tasks: Sequence[Task]) -> None:
        """Hands tasks over. Does not wait for the pipe: the first answer's deadline covers that."""
        self.num_tasks += len(tasks)
        self._tasks.write(frame(tasks))

    async def next_grade(self, deadline_s: float) -> Grade:
        """The next grade; a failure where there is none, after which the process is of no use."""
        reading = asyncio.ensure_future(self._read())
        try:
            # The second wait is for an answer that came in time while the event loop itself stood still.
            for wait_s in (deadline_s, GRACE_S):
                await asyncio.wait([reading], timeout=wait_s)
            return _grade(reading.result()) if reading.done() else _failure(Outcome.TIMEOUT)
        except (asyncio.IncompleteReadError, msgspec.MsgspecError):
            return _failure(Outcome.ERROR)
        finally:
            reading.cancel()
            await asyncio.wait([reading])  # nobody else may read before it has let go

    def kill(self) -> None:
        self._is_killed = True
        with suppress(ProcessLookupError):
            self._process.kill()

    async def ended(self) -> None:
        """Waits until a killed process is gone and its pipes are closed."""
        await self._process.wait()
        self._tasks.close()
        await self._grades.read()

    async def _read(self) -> bytes:
        size = int.from_bytes(await self._grades.readexactly(HEAD_BYTES), "little")
        if size > MAX_ANSWER_BYTES:
            raise msgspec.DecodeError(f"found a frame of {size} bytes, expected at most {MAX_ANSWER_BYTES}")
        return await self._grades.readexactly(size)


def _grade(data: bytes) -> Grade:
    grade = msgspec.msgpack.decode(data, type=Grade)
    if not (grade.outcome.graded and math.isfinite(grade.correct) and math.isfinite(grade.reward)):
        raise msgspec.ValidationError(f"found {grade}, expected finite rewards")
    return grade


def _failure(outcome: Outcome) -> Grade:
    return Grade(outcome=outcome, correct=0.0, reward=0.0)
