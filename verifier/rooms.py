"""A verifier's credits: how many groups it holds, and how many more it promised room for."""

import asyncio
from collections import deque
from typing import Final

RESERVED_S: Final = 10.0


class Rooms:
    """Room for `max_groups`, reserved by one peer or taken by a group. A reservation that is not used expires.

    For one event loop; nothing here is awaited but the waiting itself.
    """

    def __init__(self, max_groups: int, *, reserved_s: float = RESERVED_S) -> None:
        self._max_groups = max_groups
        self._reserved_s = reserved_s
        self._num_taken = 0
        self._reserved: deque[tuple[float, bytes]] = deque()
        self._freed = asyncio.Event()

    @property
    def num_free(self) -> int:
        """Room that is neither taken nor reserved."""
        now = _now()
        while self._reserved and self._reserved[0][0] <= now:
            self._reserved.popleft()
        return self._max_groups - self._num_taken - len(self._reserved)

    async def reserve(self, peer: bytes, num_groups: int, *, hold_s: float) -> int:
        """Reserves up to `num_groups` as soon as there is room for one; 0 after `hold_s` without."""
        if not await self._wait(hold_s):
            return 0
        granted = max(0, min(num_groups, self.num_free))
        self._reserved.extend([(_now() + self._reserved_s, peer)] * granted)
        return granted

    async def take(self, peer: bytes, *, hold_s: float) -> bool:
        """Takes the peer's oldest reservation, or any free room; False after `hold_s` without."""
        if not self.give_up_reservation(peer) and not await self._wait(hold_s):
            return False
        self._num_taken += 1
        return True

    def release(self) -> None:
        """Frees the room of a group."""
        self._num_taken -= 1
        self._wake()

    def give_up_reservation(self, peer: bytes) -> bool:
        """Ends the peer's oldest reservation; False where it has none."""
        found = next((entry for entry in self._reserved if entry[1] == peer), None)
        if found is None:
            return False
        self._reserved.remove(found)
        self._wake()
        return True

    async def _wait(self, hold_s: float) -> bool:
        give_up = _now() + hold_s
        while self.num_free <= 0:
            now = _now()
            if now >= give_up:
                return False
            next_expiry = self._reserved[0][0] if self._reserved else give_up
            try:
                await asyncio.wait_for(self._freed.wait(), min(next_expiry, give_up) - now)
            except TimeoutError:
                continue
        return True

    def _wake(self) -> None:
        freed, self._freed = self._freed, asyncio.Event()
        freed.set()


def _now() -> float:
    return asyncio.get_running_loop().time()
