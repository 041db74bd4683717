"""How a process belongs to a run: it says hello to the ledger and then beats, as often as the ledger asks for."""

import asyncio
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from common import wire
from common.transport import Client


class Activity:
    """What a process did since it was last asked: busy time, tokens, items.

    Busy is the union of all intervals in which at least one `working()` block was open.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` says the seconds since the epoch."""
        self._clock = clock
        self._since = clock()
        self._busy_from: float | None = None
        self._num_open = 0
        self._busy: list[wire.Span] = []
        self._num_tokens = 0
        self._num_items = 0
        self.gauges: dict[str, float] = {}

    @contextmanager
    def working(self) -> Generator[None]:
        """The process has work inside this block."""
        if self._num_open == 0:
            self._busy_from = self._clock()
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1
            if self._num_open == 0:
                self._close_span(self._clock())

    def count(self, *, num_tokens: int, num_items: int) -> None:
        """Adds finished work."""
        self._num_tokens += num_tokens
        self._num_items += num_items

    def take(self) -> wire.Stats:
        """What happened since the last call."""
        now = self._clock()
        if self._num_open > 0:
            self._close_span(now)
            self._busy_from = now
        stats = wire.Stats(
            interval=wire.Span(self._since, now),
            busy=tuple(self._busy),
            num_tokens=self._num_tokens,
            num_items=self._num_items,
            gauges=dict(self.gauges),
        )
        self._since, self._busy, self._num_tokens, self._num_items = now, [], 0, 0
        return stats

    def _close_span(self, now: float) -> None:
        if self._busy_from is not None:
            self._busy.append(wire.Span(self._busy_from, now))
        self._busy_from = None


class Membership:
    """Keeps a process known to the ledger, and its leases alive."""

    def __init__(
        self,
        ledger: Client,
        hello: wire.Hello,
        activity: Activity,
        *,
        deadline_s: float,
        holds: Callable[[], tuple[wire.LeaseKey, ...]] = tuple,
        finished: Callable[[], tuple[wire.LeaseKey, ...]] = tuple,
        cancel: Callable[[tuple[wire.LeaseKey, ...]], None] = lambda _: None,
    ) -> None:
        """`holds` names the leases to renew, and `finished` those of them that lack no completion.

        `cancel` hears of those no longer wanted. All three are called in the loop.
        """
        self._ledger = ledger
        self._hello = hello
        self._activity = activity
        self._deadline_s = deadline_s
        self._holds = holds
        self._finished = finished
        self._cancel = cancel

    async def join(self) -> wire.Welcome:
        """Says hello.

        Raises:
            RefusedError: The ledger is of another run or protocol.
            DeadlineError: No ledger within the deadline.
        """
        return await self._ledger.ask(self._hello, wire.Welcome, deadline_s=self._deadline_s)

    async def keep(self) -> None:
        """Beats until cancelled; says hello again to a ledger that does not know the process.

        Raises:
            DeadlineError: No sign of life from the ledger within the deadline.
        """
        while True:
            beat = wire.Beat(
                role=self._hello.role,
                name=self._hello.name,
                holds=self._holds(),
                finished=self._finished(),
                stats=self._activity.take(),
            )
            answer = await self._ledger.ask(beat, wire.BeatAnswer, deadline_s=self._deadline_s)
            if not answer.known:
                await self.join()
            if answer.cancelled:
                self._cancel(answer.cancelled)
            await asyncio.sleep(answer.next_s)
