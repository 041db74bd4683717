"""Work on many pieces by a bounded number of threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


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
