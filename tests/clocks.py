"""Time in tests: clocks that a test moves, and waits that measure nothing, so that no verdict depends on a machine."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE_S = 900.0  # of a wait for what must come: it measures nothing, and only ends a test that hangs
_TURNS = 100


class ManualClock:
    """A clock for code that takes one."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class ManualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands still until it is moved; sockets, pipes, processes and threads go on."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        super().__init__()

    def time(self) -> float:
        return self.clock()


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop whose time goes on, and that a test can move ahead: what was to happen by then happens now."""

    def __init__(self) -> None:
        self.clock = ManualClock(0.0)
        super().__init__()

    def time(self) -> float:
        return super().time() + self.clock()


def run_by_hand(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` in a loop whose time only `pass_time` moves."""
    with asyncio.Runner(loop_factory=ManualLoop) as runner:
        return runner.run(main)


async def settle() -> None:
    """All that can go on now without waiting for another process has gone on: each turn reads what has arrived."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


def move_time(seconds: float) -> None:
    """Moves the time of the running loop ahead."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ManualLoop | SkippingLoop)
    loop.clock.now += seconds


async def pass_time(seconds: float) -> None:
    """Moves the time of the running loop when all that was under way has gone on, and lets what is due go on."""
    await settle()
    move_time(seconds)
    await settle()


def wait_until(holds: Callable[[], object], what: str) -> None:
    """Blocks until something has come about."""
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until, f"waited {PATIENCE_S:g} s for {what}"
        time.sleep(0.005)


async def comes_about(holds: Callable[[], object], what: str) -> None:
    """Waits for it in a thread, so that the loop goes on, whatever its clock."""
    await asyncio.to_thread(wait_until, holds, what)
