"""Requests that are held until what they ask about changes."""

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import TypeVar

HOLD_S = 2.0
LONG_HOLD_S = 20.0

A = TypeVar("A")


class Topic(Enum):
    """What a held request waits for: each change wakes only those whom it may concern."""

    LEASES = "a free place, or a prompt to evaluate"
    BATCH = "a scored group, or the end of a lease"
    DIRECTORY = "another directory"
    EVALUATIONS = "a finished evaluation"


class HeldRequests:
    """Those who wait, by topic."""

    def __init__(self) -> None:
        self._changed = {topic: asyncio.Event() for topic in Topic}

    def wake(self, *topics: Topic) -> None:
        """Those who wait for one of the topics look again."""
        for topic in topics:
            changed, self._changed[topic] = self._changed[topic], asyncio.Event()
            changed.set()

    async def change(self, topic: Topic, timeout_s: float) -> None:
        """Returns when the topic has changed, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed[topic].wait()
        except TimeoutError:
            return

    async def wait(self, topic: Topic, answer: Callable[[], A], hold_s: float = HOLD_S) -> A | None:
        """The first answer that is not empty; None after `hold_s`.

        An answer that was made is never lost to the deadline: a cancellation reaches only the wait itself.
        """
        try:
            async with asyncio.timeout(hold_s):
                while not (found := answer()):
                    await self._changed[topic].wait()
                return found
        except TimeoutError:
            return None
