"""What an engine was asked and has not done yet."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from common.errors import DeadlineError, EngineError
from common.log import logger

T = TypeVar("T")


class Underway:
    """Requests to an engine, each a task of its own, so that they end before the engine does.

    A request to its control (to pause, load, continue) must not be broken off: SGLang sets the result of a future whose
    waiter is gone, which ends the task that hears the engine's processes, and leaves a pause for ever. One to sample
    may be: SGLang then stops it in the engine.
    """

    def __init__(self) -> None:
        self._to_their_end: dict[asyncio.Task[Any], str] = {}
        self._while_asked: set[asyncio.Task[Any]] = set()
        self._late: set[asyncio.Task[Any]] = set()
        self._is_over = False

    async def to_its_end(self, request: Coroutine[Any, Any, T], what: str, *, deadline_s: float) -> T:
        """The result of a request that goes on where whoever asks is cancelled or waits no longer.

        Args:
            request: A request to the engine's control.
            what: What it waits for, for the message.
            deadline_s: How long whoever asks waits.

        Raises:
            DeadlineError: It has not ended in time.
            EngineError: The engine is closed.
        """
        task = self._begin(request)
        self._to_their_end[task] = what
        task.add_done_callback(self._ended)
        await asyncio.wait({task}, timeout=deadline_s)  # which cancels no task
        if not task.done():
            self._late.add(task)
            raise DeadlineError(f"waited {deadline_s:g} s for {what}")
        return task.result()

    async def while_asked(self, request: Coroutine[Any, Any, T]) -> T:
        """The result of a request that is broken off with whoever asks.

        Raises:
            EngineError: The engine is closed.
        """
        task = self._begin(request)
        self._while_asked.add(task)
        task.add_done_callback(self._while_asked.discard)
        return await task

    async def finish(self, *, deadline_s: float) -> None:
        """Takes no more requests, breaks off those to sample, and waits for the others, though not for ever.

        Those whose asker has waited in vain are not waited for again.
        """
        self._is_over = True
        for task in self._while_asked:
            task.cancel()
        if self._to_their_end:
            logger().info("engine_finishes", waits_for=[*self._to_their_end.values()])
        began = time.monotonic()
        if tasks := {*self._to_their_end, *self._while_asked} - self._late:
            await asyncio.wait(tasks, timeout=deadline_s)
        if self._to_their_end:
            waited_s = round(time.monotonic() - began, 1)
            logger().warning("engine_given_up", waited_s=waited_s, waited_for=[*self._to_their_end.values()])

    async def break_off(self, *, deadline_s: float) -> None:
        """Cancels what `finish` did not wait for any longer: only once nobody hears the engine's processes."""
        await cancel({*self._to_their_end, *self._while_asked}, deadline_s=deadline_s)

    def _begin(self, request: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        if self._is_over:
            request.close()
            raise EngineError("the engine is closed")
        return asyncio.create_task(request)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        del self._to_their_end[task]
        self._late.discard(task)
        if not task.cancelled():
            task.exception()  # asyncio complains of one that nobody asked for, where whoever asks was cancelled


async def cancel(tasks: set[asyncio.Task[Any]], *, deadline_s: float) -> None:
    """Cancels tasks and waits for their end, though not for ever: one may heed it late or not at all."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=deadline_s)
