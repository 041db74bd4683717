"""Work in threads: on many pieces by a bounded number of them, and for a task that must not leave it half done."""

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import ParamSpec, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
P = ParamSpec("P")
_SHARE = 4  # a quarter of the cores: others work beside


def num_threads() -> int:
    """How many threads a process may keep busy beside training; the publishers of a node's learner ranks share."""
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's, of this node
    return max(1, len(os.sched_getaffinity(0)) // _SHARE // num_ranks)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """The results of `work` in the order of the items; at most twice `num_threads` are under way or not yet taken."""
    if num_threads == 1:
        yield from map(work, items)
        return
    rest = iter(items)
    with ThreadPoolExecutor(num_threads) as pool:
        under_way: deque[Future[Result]] = deque(pool.submit(work, item) for item in islice(rest, 2 * num_threads))
        try:
            while under_way:
                result = under_way.popleft().result()
                under_way.extend(pool.submit(work, item) for item in islice(rest, 1))
                yield result
        finally:
            for future in under_way:
                future.cancel()


async def to_its_end(work: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """What `work` returns, in a thread; whoever is cancelled meanwhile waits for its end first."""
    working = asyncio.create_task(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    finally:
        while not working.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({working})
        working.exception()  # looked at, where whoever asked no longer does
